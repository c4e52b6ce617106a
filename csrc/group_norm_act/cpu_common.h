// What the forward and the backward kernel share: how work is cut up.
#pragma once

#include "../common/buffer.h"
#include "../common/parallel.h"
#include "../common/vec.h"
#include "problem.h"

namespace imagen_fast::IMAGEN_FAST_ISA::group_norm_act {

using namespace imagen_fast::group_norm_act;

// Whether slabs of that many elements, such as samples or groups of one, handed out whole, would leave threads idle.
inline bool should_split_slabs(int64_t slabs, int64_t slab_size) {
  const int64_t threads = num_threads();
  return slab_size > kElementsPerThread && 4 * ceil_div(slabs, threads) * threads > 5 * slabs;
}

// Channels-last memory is a sequence of positions of `channels` values each. It is worked on in rows of `width`
// columns: one position, or several where the channels alone would leave most of a vector empty.
struct Columns {
  explicit Columns(int64_t channels)
      : channels(channels),
        positions(channels < kFewChannels ? ceil_div(kFewChannels, channels) : 1),
        width(channels * positions) {}
  Columns(int64_t channels, int64_t positions)
      : channels(channels), positions(positions), width(channels * positions) {}

  // Pairs of channels as columns
  Columns halved() const { return {channels / 2, positions}; }

  // array[c], c < channels, again for each further position of a row
  template <typename S>
  void repeat(S* array) const {
    for (int64_t i = channels; i < width; ++i) array[i] = array[i - channels];
  }

  // The inverse for sums over columns: array[c] becomes the sum over the positions of a row.
  template <typename S>
  void fold(S* array) const {
    for (int64_t i = channels; i < width; ++i) array[i % channels] += array[i];
  }

  static constexpr int64_t kFewChannels = 32;

  const int64_t channels;
  const int64_t positions;
  const int64_t width;
};

// Channels-last samples are cut into blocks of positions. Their size depends on the shape alone, so that sums do not
// depend on the number of threads.
struct Blocks {
  // About `elements` each, and at most `most` positions: a sum over a block is a chain of that many additions.
  Blocks(const Problem& problem, int64_t elements, int64_t most)
      : positions(problem.positions), size(elements / problem.channels) {
    size = size < 4 ? 4 : size > most ? most : size;
    per_sample = ceil_div(positions, size);
  }

  int64_t begin(int64_t block) const { return block * size; }
  int64_t length(int64_t block) const { return block + 1 < per_sample ? size : positions - block * size; }

  int64_t positions;
  int64_t size;
  int64_t per_sample;
};

}  // namespace imagen_fast::IMAGEN_FAST_ISA::group_norm_act
