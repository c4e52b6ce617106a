// The host's side of a launch, by the CUDA runtime. (In the emulator: simt/launch.h.)
#pragma once

#include <cuda_runtime.h>

#include <mutex>
#include <set>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace imagen_fast {

using Stream = cudaStream_t;

struct LaunchConfig {
  dim3 grid = 1;
  dim3 block = 1;
  size_t shared_bytes = 0;   // dynamic shared memory of a block
  unsigned cluster = 1;      // blocks of a cluster, along x; more than 1 needs DeviceProperties::clusters()
  bool cooperative = false;  // all blocks are resident at once, and grid_sync() works
  Stream stream = nullptr;
};

struct DeviceProperties {
  int capability;              // 10 * major + minor: 80, 90, 100, 120
  int multiprocessors;         //
  int shared_bytes_per_block;  // the most that a kernel can have, dynamic and static together
  int shared_bytes_per_multiprocessor;
  int threads_per_multiprocessor;
  int l2_bytes;

  bool clusters() const { return capability >= 90; }
};

inline void check_cuda(cudaError_t status, const char* what) {
  if (status != cudaSuccess) {
    cudaGetLastError();  // so that it is not reported once more by whoever asks next
    throw std::runtime_error(std::string("imagen_fast: ") + what + ": " + cudaGetErrorString(status));
  }
}

// Of the current device
inline const DeviceProperties& device_properties() {
  static std::mutex mutex;
  static std::vector<DeviceProperties*> known;  // by device; never freed, so references stay good
  int device;
  check_cuda(cudaGetDevice(&device), "the current device");
  const std::lock_guard<std::mutex> lock(mutex);
  if (known.size() <= static_cast<size_t>(device)) known.resize(device + 1);
  if (!known[device]) {
    const auto attribute = [device](cudaDeviceAttr name) {
      int value;
      check_cuda(cudaDeviceGetAttribute(&value, name, device), "the properties of the device");
      return value;
    };
    known[device] = new DeviceProperties{
        10 * attribute(cudaDevAttrComputeCapabilityMajor) + attribute(cudaDevAttrComputeCapabilityMinor),
        attribute(cudaDevAttrMultiProcessorCount),
        attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin),
        attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor),
        attribute(cudaDevAttrMaxThreadsPerMultiProcessor),
        attribute(cudaDevAttrL2CacheSize)};
  }
  return *known[device];
}

// Let a kernel have as much dynamic shared memory as the device has beside its static variables. Without that, the two
// together are limited to 48 KB. Asked once for each kernel and device, so that threads do not change each other's
// limit.
template <typename... Parameters>
void allow_shared_bytes(void (*kernel)(Parameters...), size_t bytes) {
  if (bytes == 0) return;
  static std::mutex mutex;
  static std::set<std::pair<void (*)(Parameters...), int>> allowed;
  int device;
  check_cuda(cudaGetDevice(&device), "the current device");
  const std::lock_guard<std::mutex> lock(mutex);
  if (allowed.count({kernel, device})) return;
  cudaFuncAttributes attributes;
  check_cuda(cudaFuncGetAttributes(&attributes, kernel), "a kernel's attributes");
  const int most = device_properties().shared_bytes_per_block - static_cast<int>(attributes.sharedSizeBytes);
  check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most),
             "a kernel's shared memory");
  allowed.insert({kernel, device});
}

// How many blocks one multiprocessor holds at a time: a cooperative grid may have that many per multiprocessor.
template <typename... Parameters>
int resident_blocks(void (*kernel)(Parameters...), int threads, size_t shared_bytes) {
  allow_shared_bytes(kernel, shared_bytes);
  int blocks;
  check_cuda(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, threads, shared_bytes),
             "a kernel's occupancy");
  return blocks;
}

// What a LaunchConfig is to the runtime
struct RuntimeLaunch {
  explicit RuntimeLaunch(const LaunchConfig& config) {
    launch.gridDim = config.grid;
    launch.blockDim = config.block;
    launch.dynamicSmemBytes = config.shared_bytes;
    launch.stream = config.stream;
    launch.attrs = attributes;
    launch.numAttrs = 0;
    if (config.cluster > 1) {
      cudaLaunchAttribute& attribute = attributes[launch.numAttrs++];
      attribute.id = cudaLaunchAttributeClusterDimension;
      attribute.val.clusterDim.x = config.cluster;
      attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
    }
    if (config.cooperative) {
      cudaLaunchAttribute& attribute = attributes[launch.numAttrs++];
      attribute.id = cudaLaunchAttributeCooperative;
      attribute.val.cooperative = 1;
    }
  }
  RuntimeLaunch(const RuntimeLaunch&) = delete;  // `launch` points into it

  cudaLaunchConfig_t launch{};
  cudaLaunchAttribute attributes[2];
};

// How many clusters of this configuration the device holds at a time; 0 if none fits
template <typename... Parameters>
int resident_clusters(const LaunchConfig& config, void (*kernel)(Parameters...)) {
  allow_shared_bytes(kernel, config.shared_bytes);
  const RuntimeLaunch runtime(config);
  int clusters;
  check_cuda(cudaOccupancyMaxActiveClusters(&clusters, kernel, &runtime.launch), "a kernel's clusters");
  return clusters;
}

// Start kernel(arguments…). The arguments are converted to the kernel's parameters. Throws std::runtime_error.
template <typename... Parameters, typename... Arguments>
void launch(const LaunchConfig& config, void (*kernel)(Parameters...), Arguments&&... arguments) {
  allow_shared_bytes(kernel, config.shared_bytes);
  const RuntimeLaunch runtime(config);
  check_cuda(cudaLaunchKernelEx(&runtime.launch, kernel, static_cast<Parameters>(arguments)...), "a kernel's launch");
}

}  // namespace imagen_fast
