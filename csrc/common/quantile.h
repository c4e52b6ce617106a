// The exact quantile of magnitudes, linearly interpolated, without a sort: one pass over memory in nearly all cases.
//
// Magnitudes of floats are ordered as their bits are, read as an integer: the key. A few hundred values taken at even
// distances bracket the wanted rank closely (Floyd and Rivest, "Expected time bounds for selection", 1975); the pass
// counts the keys below the bracket and keeps those in it, some percent of all. Among those, a histogram of their
// leading bits finds the rank's neighbourhood, again and again until few are left to sort. If the rank is outside of
// the bracket, the pass is made again on the side where it is. What is found does not depend on the bracket, so that
// the result is exact whatever the data, and the same for any number of threads.
#pragma once

#include "buffer.h"
#include "parallel.h"
#include "vec.h"

namespace imagen_fast::IMAGEN_FAST_ISA {

template <typename S>
struct KeyOf {
  using type = uint32_t;
  static constexpr type kInfinity = 0x7f800000u;
};
template <>
struct KeyOf<double> {
  using type = uint64_t;
  static constexpr type kInfinity = 0x7ff0000000000000u;
};
template <typename S>
using Key = typename KeyOf<S>::type;

template <typename S>
inline Key<S> key_of(S value) {
  return bit_cast<Key<S>>(value) & static_cast<Key<S>>(~Key<S>{0} >> 1);
}

// Two neighbours in the order of n values
template <typename K>
struct Neighbours {
  K lower;
  K upper;
};

namespace quantile {

constexpr int kDigits = 11;   // bits of a key that a histogram distinguishes
constexpr int64_t kFew = 24;  // keys that are sorted by insertion

template <typename K>
inline void sort_few(K* keys, int64_t n) {
  for (int64_t i = 1; i < n; ++i) {
    const K key = keys[i];
    int64_t j = i;
    for (; j > 0 && keys[j - 1] > key; --j) keys[j] = keys[j - 1];
    keys[j] = key;
  }
}

// The keys of ranks `rank` and `rank` + 1 among n; `above` where rank is the last one. Reorders the keys.
template <typename K>
inline Neighbours<K> select(K* keys, int64_t n, int64_t rank, K above) {
  uint32_t histogram[1 << kDigits];
  for (;;) {
    if (n <= kFew) {
      sort_few(keys, n);
      return {keys[rank], rank + 1 < n ? keys[rank + 1] : above};
    }
    K least = keys[0], most = keys[0];
    for (int64_t i = 1; i < n; ++i) {
      least = keys[i] < least ? keys[i] : least;
      most = keys[i] > most ? keys[i] : most;
    }
    if (least == most) return {least, rank + 1 < n ? least : above};
    int shift = 0;
    while ((most - least) >> shift >> kDigits) ++shift;

    for (auto& count : histogram) count = 0;
    for (int64_t i = 0; i < n; ++i) ++histogram[(keys[i] - least) >> shift];
    int64_t before = 0;
    K digit = 0;
    while (before + histogram[digit] <= rank) before += histogram[digit++];

    // Of the digit's keys, and the least one after them
    int64_t kept = 0;
    for (int64_t i = 0; i < n; ++i) {
      const K key = keys[i];
      const K d = (key - least) >> shift;
      keys[kept] = key;
      kept += d == digit;
      above = d > digit && key < above ? key : above;
    }
    n = kept;
    rank -= before;
    if (shift == 0) return {keys[0], rank + 1 < n ? keys[0] : above};
  }
}

// What a pass found in a part of the values: how many keys are below the bracket, how many in it, and the extremes.
template <typename K>
struct Part {
  int64_t below;
  int64_t inside;
  K above;  // the least key above the bracket
  K most;   // the largest key of all
};

template <typename K>
struct Bracket {
  K low, high;  // both belong to it
};

// Keys inside are written to `kept`, which has room for n; only counted if low == high.
template <typename T, typename K>
inline void sift_scalar(const T* x, int64_t n, Bracket<K> bracket, K* kept, Part<K>& part) {
  const bool keep = bracket.low != bracket.high;
  for (int64_t i = 0; i < n; ++i) {
    const K key = key_of(widen(x[i]));
    const bool inside = key - bracket.low <= bracket.high - bracket.low;
    if (keep) kept[part.inside] = key;
    part.below += key < bracket.low;
    part.inside += inside;
    part.above = key > bracket.high && key < part.above ? key : part.above;
    part.most = key > part.most ? key : part.most;
  }
}

template <typename T, typename K>
inline Part<K> sift(const T* x, int64_t n, Bracket<K> bracket, K* kept) {
  Part<K> part{0, 0, ~K{0}, 0};
  int64_t i = 0;
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<K, uint32_t>) {
    const bool keep = bracket.low != bracket.high;
    const __m512i low = _mm512_set1_epi32(static_cast<int>(bracket.low));
    const __m512i high = _mm512_set1_epi32(static_cast<int>(bracket.high));
    __m512i above = _mm512_set1_epi32(-1), most = _mm512_setzero_si512();
    for (; i + 16 <= n; i += 16) {
      const __m512i key = _mm512_castps_si512(abs(Vec<float>::load(x + i)).raw);
      const __mmask16 is_below = _mm512_cmplt_epu32_mask(key, low);
      const __mmask16 is_above = _mm512_cmpgt_epu32_mask(key, high);
      const __mmask16 inside = static_cast<__mmask16>(~(is_below | is_above));
      if (keep) _mm512_storeu_si512(kept + part.inside, _mm512_maskz_compress_epi32(inside, key));
      part.below += __builtin_popcount(is_below);
      part.inside += __builtin_popcount(inside);
      above = _mm512_mask_min_epu32(above, is_above, above, key);
      most = _mm512_max_epu32(most, key);
    }
    part.above = _mm512_reduce_min_epu32(above);
    part.most = _mm512_reduce_max_epu32(most);
  }
#elif defined(__AVX2__)
  if constexpr (std::is_same_v<K, uint32_t>) {
    const bool keep = bracket.low != bracket.high;
    // No key has the sign bit, so that signed comparisons do.
    const __m256i low = _mm256_set1_epi32(static_cast<int>(bracket.low));
    const __m256i high = _mm256_set1_epi32(static_cast<int>(bracket.high & 0x7fffffffu));
    __m256i above = _mm256_set1_epi32(0x7fffffff), most = _mm256_setzero_si256();
    for (; i + 8 <= n; i += 8) {
      const __m256i key = _mm256_castps_si256(abs(Vec<float>::load(x + i)).raw);
      const __m256i is_below = _mm256_cmpgt_epi32(low, key);
      const __m256i is_above = _mm256_cmpgt_epi32(key, high);
      const unsigned outside = _mm256_movemask_ps(_mm256_castsi256_ps(_mm256_or_si256(is_below, is_above)));
      part.below += __builtin_popcount(_mm256_movemask_ps(_mm256_castsi256_ps(is_below)));
      above = _mm256_min_epi32(above, _mm256_or_si256(_mm256_andnot_si256(is_above, _mm256_set1_epi32(0x7fffffff)),
                                                      _mm256_and_si256(is_above, key)));
      most = _mm256_max_epi32(most, key);
      unsigned inside = ~outside & 0xffu;
      if (keep && inside) {
        alignas(32) K lane[8];
        _mm256_store_si256(reinterpret_cast<__m256i*>(lane), key);
        for (int64_t at = part.inside; inside; inside &= inside - 1) kept[at++] = lane[__builtin_ctz(inside)];
      }
      part.inside += 8 - __builtin_popcount(outside);
    }
    alignas(32) K lane[2][8];
    _mm256_store_si256(reinterpret_cast<__m256i*>(lane[0]), above);
    _mm256_store_si256(reinterpret_cast<__m256i*>(lane[1]), most);
    for (int j = 0; j < 8; ++j) {
      part.above = lane[0][j] < part.above ? lane[0][j] : part.above;
      part.most = lane[1][j] > part.most ? lane[1][j] : part.most;
    }
  }
#endif
  // A scalar pass writes one key past those it keeps, and never past the n-th.
  sift_scalar(x + i, n - i, bracket, kept, part);
  return part;
}

constexpr int64_t kSample = 1024;
constexpr int64_t kChunk = 32768;  // values; depends on nothing, though the result would bear it

// A bracket that holds `rank` and the next one of n values with a probability of about 0.999
template <typename T, typename K>
inline Bracket<K> guess(const T* x, int64_t n, int64_t rank) {
  K sample[kSample], again[kSample];
  // An odd distance, so that columns of an image are not taken again and again
  const int64_t distance = (n / kSample - 1) | 1;
  for (int64_t i = 0; i < kSample; ++i) sample[i] = again[i] = key_of(widen(x[i * distance]));
  const double share = static_cast<double>(rank) / static_cast<double>(n - 1);
  const double place = share * (kSample - 1);
  const double doubt = 3.3 * std::sqrt(kSample * share * (1 - share)) + 3;
  const int64_t low = static_cast<int64_t>(place - doubt), high = static_cast<int64_t>(place + doubt) + 1;
  return {low > 0 ? select(sample, kSample, low, ~K{0}).lower : K{0},
          high < kSample ? select(again, kSample, high, ~K{0}).lower : ~K{0}};
}

}  // namespace quantile

// The keys of ranks `rank` and `rank` + 1 (if that is < n) of n > 0 values; a NaN has a key above that of infinity,
// and any of them makes both keys such. `scratch` has room for n keys.
template <typename T, typename K = Key<AccumulateType<T>>>
inline Neighbours<K> select_magnitudes(const T* x, int64_t n, int64_t rank, K* scratch) {
  using namespace quantile;
  constexpr K kInfinity = KeyOf<AccumulateType<T>>::kInfinity;
  Bracket<K> bracket = n > 4 * kSample ? guess<T, K>(x, n, rank) : Bracket<K>{0, ~K{0}};
  const int64_t chunks = (n + kChunk - 1) / kChunk;
  Buffer<Part<K>> parts(chunks);
  for (;;) {
    parallel_for(chunks, kChunk, [&](int64_t begin, int64_t end) {
      for (int64_t c = begin; c < end; ++c) {
        const int64_t first = c * kChunk;
        parts[c] = sift(x + first, n - first < kChunk ? n - first : kChunk, bracket, scratch + first);
      }
    });
    Part<K> all = parts[0];
    for (int64_t c = 1; c < chunks; ++c) {
      if (bracket.low != bracket.high) {
        std::memmove(scratch + all.inside, scratch + c * kChunk, static_cast<size_t>(parts[c].inside) * sizeof(K));
      }
      all.below += parts[c].below;
      all.inside += parts[c].inside;
      all.above = parts[c].above < all.above ? parts[c].above : all.above;
      all.most = parts[c].most > all.most ? parts[c].most : all.most;
    }
    if (all.most > kInfinity) return {all.most, all.most};
    if (rank < all.below) {
      bracket = {0, bracket.low - 1};
    } else if (rank >= all.below + all.inside) {
      bracket = {bracket.high + 1, ~K{0}};
    } else if (bracket.low == bracket.high) {
      return {bracket.low, rank + 1 < all.below + all.inside ? bracket.low : all.above};
    } else {
      return select(scratch, all.inside, rank - all.below, all.above);
    }
  }
}

// numpy's linear quantile of |x| over n > 0 values, q in [0, 1]. `scratch` has room for n keys.
template <typename T, typename S = AccumulateType<T>>
inline S abs_quantile(const T* x, int64_t n, double q, Key<S>* scratch) {
  const double place = q * static_cast<double>(n - 1);
  const int64_t rank = static_cast<int64_t>(place);
  const double weight = place - static_cast<double>(rank);
  const auto keys = select_magnitudes(x, n, rank, scratch);
  const double lower = bit_cast<S>(keys.lower), upper = bit_cast<S>(keys.upper);
  if (weight == 0 || lower == upper) return static_cast<S>(lower);
  if (std::isinf(upper)) return static_cast<S>(upper);
  const double difference = upper - lower;
  return static_cast<S>(weight < 0.5 ? lower + difference * weight : upper - difference * (1 - weight));
}

}  // namespace imagen_fast::IMAGEN_FAST_ISA
