// Accesses of 2 to 16 bytes at once, for vectors of elements.
#pragma once

namespace imagen_fast {

// N elements in registers; in memory they are aligned to their size.
template <typename T, int N>
struct alignas(sizeof(T) * N) Vector {
  static_assert(sizeof(T) * N <= 16, "one access is 16 bytes at most");
  T data[N];

  __device__ __forceinline__ T& operator[](int i) { return data[i]; }
  __device__ __forceinline__ const T& operator[](int i) const { return data[i]; }
};

// The most elements of T in one access
template <typename T>
constexpr int kMaxVector = 16 / static_cast<int>(sizeof(T));

// The unsigned type that an access of so many bytes moves
template <int bytes>
struct Word;
template <>
struct Word<1> {
  using type = unsigned char;
};
template <>
struct Word<2> {
  using type = unsigned short;
};
template <>
struct Word<4> {
  using type = unsigned int;
};
template <>
struct Word<8> {
  using type = uint2;
};
template <>
struct Word<16> {
  using type = uint4;
};

// How long the caches should keep what is accessed: as usual, or (streaming) not at all, because it is not used again.
enum class Cache { kDefault, kStreaming };

// Load N elements from global or shared memory; `source` is aligned to N elements.
template <int N, Cache cache = Cache::kDefault, typename T>
__device__ __forceinline__ Vector<T, N> load(const T* source) {
  using W = typename Word<sizeof(T) * N>::type;
  const W* address = check_aligned(reinterpret_cast<const W*>(source));
  W word;
  if constexpr (cache == Cache::kStreaming) {
    word = __ldcs(address);
  } else {
    word = *address;
  }
  Vector<T, N> result;
  memcpy(&result, &word, sizeof(word));
  return result;
}

// Store N elements to global or shared memory; `target` is aligned to N elements.
template <int N, Cache cache = Cache::kDefault, typename T>
__device__ __forceinline__ void store(T* target, const Vector<T, N>& value) {
  using W = typename Word<sizeof(T) * N>::type;
  W* address = check_aligned(reinterpret_cast<W*>(target));
  W word;
  memcpy(&word, &value, sizeof(word));
  if constexpr (cache == Cache::kStreaming) {
    __stcs(address, word);
  } else {
    *address = word;
  }
}

// Whether `pointer` is aligned to so many bytes: what a launcher asks before it takes a vectorised path
__host__ __device__ inline bool is_aligned(const void* pointer, size_t bytes) {
  return reinterpret_cast<uintptr_t>(pointer) % bytes == 0;
}

}  // namespace imagen_fast
