// launch() and what it asks of the device; the same interface as cuda_launch.cuh.
#pragma once

#include <tuple>

#include "scheduler.h"

namespace imagen_fast {

using Stream = void*;

struct LaunchConfig {
  dim3 grid = 1;
  dim3 block = 1;
  size_t shared_bytes = 0;
  unsigned cluster = 1;
  bool cooperative = false;
  Stream stream = nullptr;
};

struct DeviceProperties {
  int capability;
  int multiprocessors;
  int shared_bytes_per_block;
  int shared_bytes_per_multiprocessor;
  int threads_per_multiprocessor;
  int l2_bytes;

  bool clusters() const { return capability >= 90; }
};

// Of the device that is emulated; see set_option.
const DeviceProperties& device_properties();

namespace simt {

// Options, also from the environment, as IMAGEN_FAST_EMULATOR="order=reverse capability=80":
//   order             forward, reverse or random: of the blocks and of the threads in them
//   seed              of the random order
//   capability        80, 86, 89, 90, 100 or 120: the device whose limits hold; sets what follows to that device's
//   multiprocessors   how many it has; few by default, because a cooperative grid's threads all exist at once
//   l2_bytes          the size of its second-level cache
// Throws std::runtime_error for what is none.
void set_option(const std::string& name, const std::string& value);

void check_and_run(const LaunchConfig& config, std::function<void()> kernel);
int resident_blocks(int threads, size_t shared_bytes);

}  // namespace simt

template <typename... Parameters>
int resident_blocks(void (*)(Parameters...), int threads, size_t shared_bytes) {
  return simt::resident_blocks(threads, shared_bytes);
}

template <typename... Parameters>
int resident_clusters(const LaunchConfig& config, void (*kernel)(Parameters...)) {
  const int threads = static_cast<int>(config.block.x * config.block.y * config.block.z);
  const int blocks = resident_blocks(kernel, threads, config.shared_bytes) * device_properties().multiprocessors;
  return device_properties().clusters() ? blocks / static_cast<int>(config.cluster) : 0;
}

template <typename... Parameters, typename... Arguments>
void launch(const LaunchConfig& config, void (*kernel)(Parameters...), Arguments&&... arguments) {
  const std::tuple<std::decay_t<Parameters>...> parameters(static_cast<Parameters>(arguments)...);
  simt::check_and_run(config, [&] { std::apply(kernel, parameters); });
}

}  // namespace imagen_fast
