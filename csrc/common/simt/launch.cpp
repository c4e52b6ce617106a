#include "launch.h"

#include <algorithm>
#include <cstdlib>
#include <mutex>
#include <sstream>
#include <stdexcept>

namespace imagen_fast {
namespace {

constexpr int kDefaultMultiprocessors = 4;
constexpr int KB = 1024;

// By capability: shared memory per block and per multiprocessor, threads per multiprocessor, cache
constexpr DeviceProperties kDevices[] = {
    {80, kDefaultMultiprocessors, 163 * KB, 164 * KB, 2048, 40 * KB * KB},
    {86, kDefaultMultiprocessors, 99 * KB, 100 * KB, 1536, 6 * KB * KB},
    {89, kDefaultMultiprocessors, 99 * KB, 100 * KB, 1536, 72 * KB * KB},
    {90, kDefaultMultiprocessors, 227 * KB, 228 * KB, 2048, 50 * KB * KB},
    {100, kDefaultMultiprocessors, 227 * KB, 228 * KB, 2048, 126 * KB * KB},
    {120, kDefaultMultiprocessors, 99 * KB, 100 * KB, 1536, 96 * KB * KB},
};

struct Options {
  simt::Order order = simt::Order::kForward;
  uint64_t seed = 0;
  DeviceProperties device = kDevices[3];

  void set(const std::string& name, const std::string& value) {
    if (name == "order") {
      const std::string orders[] = {"forward", "reverse", "random"};
      const auto* found = std::find(std::begin(orders), std::end(orders), value);
      if (found == std::end(orders)) throw std::runtime_error("CUDA emulator: order is forward, reverse or random");
      order = static_cast<simt::Order>(found - orders);
      return;
    }
    const long long number = std::atoll(value.c_str());
    if (name == "capability") {
      const auto* found =
          std::find_if(std::begin(kDevices), std::end(kDevices), [=](auto& d) { return d.capability == number; });
      if (found == std::end(kDevices)) throw std::runtime_error("CUDA emulator: no device of capability " + value);
      device = *found;
    } else if (name == "seed") {
      seed = static_cast<uint64_t>(number);
    } else if (name == "multiprocessors" && number > 0) {
      device.multiprocessors = static_cast<int>(number);
    } else if (name == "l2_bytes" && number > 0) {
      device.l2_bytes = static_cast<int>(number);
    } else {
      throw std::runtime_error("CUDA emulator: there is no option " + name + "=" + value);
    }
  }
};

Options& options() {
  static Options current = [] {
    Options initial;
    const char* environment = std::getenv("IMAGEN_FAST_EMULATOR");
    std::istringstream words(environment ? environment : "");
    for (std::string word; words >> word;) {
      const size_t equals = std::min(word.find('='), word.size() - 1);
      initial.set(word.substr(0, equals), word.substr(equals + 1));
    }
    return initial;
  }();
  return current;
}

void require(bool met, const std::string& message) {
  if (!met) throw std::runtime_error("CUDA emulator: launch: " + message);
}

std::string text(dim3 shape) {
  return "(" + std::to_string(shape.x) + ", " + std::to_string(shape.y) + ", " + std::to_string(shape.z) + ")";
}

void check_limits(const LaunchConfig& config) {
  const DeviceProperties& device = device_properties();
  const dim3 grid = config.grid, block = config.block;
  const uint64_t threads = static_cast<uint64_t>(block.x) * block.y * block.z;
  const uint64_t blocks = static_cast<uint64_t>(grid.x) * grid.y * grid.z;
  require(threads > 0 && threads <= 1024 && block.z <= 64,
          "a block of " + text(block) + " threads; it needs 1 to 1024, at most 64 along z");
  require(blocks > 0 && grid.x < 1u << 31 && grid.y < 1u << 16 && grid.z < 1u << 16,
          "a grid of " + text(grid) + " blocks; it needs at least 1, and at most 65535 along y and z");
  require(blocks < 1u << 24, "a grid of " + text(grid) + " blocks is too large for the emulator");
  require(config.shared_bytes <= static_cast<size_t>(device.shared_bytes_per_block),
          std::to_string(config.shared_bytes) + " bytes of shared memory; a block has at most " +
              std::to_string(device.shared_bytes_per_block));
  require(config.cluster > 0 && config.cluster <= 8,
          "a cluster of " + std::to_string(config.cluster) + " blocks; every device takes up to 8");
  require(config.cluster == 1 || device.clusters(), "clusters need capability 9.0");
  require(grid.x % config.cluster == 0, "clusters of " + std::to_string(config.cluster) + " blocks do not divide " +
                                            std::to_string(grid.x) + " blocks along x");
  if (config.cooperative) {
    const uint64_t most = static_cast<uint64_t>(device.multiprocessors) *
                          static_cast<uint64_t>(simt::resident_blocks(static_cast<int>(threads), config.shared_bytes));
    require(blocks <= most, "a cooperative grid of " + std::to_string(blocks) +
                                " blocks; of this size the device holds " + std::to_string(most) + " at a time");
    require(blocks * threads <= simt::kMaxFibers,
            "a cooperative grid of " + std::to_string(blocks * threads) + " threads is too large for the emulator");
  }
}

std::mutex mutex;  // one launch at a time

}  // namespace

const DeviceProperties& device_properties() { return options().device; }

namespace simt {

void set_option(const std::string& name, const std::string& value) { options().set(name, value); }

// Registers are not counted: the compiler of the host does not say how many there would be.
int resident_blocks(int threads, size_t shared_bytes) {
  const DeviceProperties& device = device_properties();
  const int by_threads = device.threads_per_multiprocessor / ((threads + 31) / 32 * 32);
  const int reserved = KB;  // of each block's shared memory
  const int by_shared_memory = device.shared_bytes_per_multiprocessor / (static_cast<int>(shared_bytes) + reserved);
  return std::min({by_threads, by_shared_memory, 32});
}

void check_and_run(const LaunchConfig& config, std::function<void()> kernel) {
  const std::lock_guard<std::mutex> lock(mutex);
  check_limits(config);
  Grid grid;
  grid.kernel = std::move(kernel);
  grid.grid = config.grid;
  grid.block = config.block;
  grid.shared_bytes = config.shared_bytes;
  grid.cluster = config.cluster;
  grid.cooperative = config.cooperative;
  run(grid, options().order, options().seed);
}

}  // namespace simt
}  // namespace imagen_fast
