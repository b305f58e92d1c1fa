// Runs a CUDA kernel's source on the CPU: every thread of a block is a fiber, and barriers and shuffles are the
// points where fibers wait for each other. What CUDA leaves undefined (a barrier that some threads do not reach, a
// shuffle across a diverged warp) aborts with a message.
#pragma once

#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <unordered_map>
#include <vector>

#define __device__
#define __global__ static
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __shared__ static

namespace emulator {

struct Index {
  unsigned x;
};

enum class Wait { NONE, BARRIER, SHUFFLE, DONE };

// A copy to shared memory that has been started: done as late as allowed, when its thread waits.
struct Copy {
  void* to;
  const void* from;
  size_t bytes;
};

struct Fiber {
  ucontext_t context;
  std::vector<Copy> copies;
  std::unique_ptr<char[]> stack;
  Wait wait;
  unsigned parity;
};

constexpr size_t STACK_BYTES = 64 * 1024;
constexpr unsigned MAX_THREADS = 1024;
constexpr unsigned WARP_SIZE = 32;

inline std::vector<Fiber> fibers(MAX_THREADS);
inline ucontext_t scheduler;
inline unsigned current;
inline std::function<void()> body;
inline float exchange[2][MAX_THREADS];  // two, as a fiber may write the next value before its neighbour reads this one

}  // namespace emulator

inline emulator::Index threadIdx, blockIdx, blockDim, gridDim;

namespace emulator {

inline void wait(Wait reason) {
  const unsigned self = current;
  fibers[self].wait = reason;
  swapcontext(&fibers[self].context, &scheduler);
  current = self;
  threadIdx.x = self;
}

inline void enter() {
  body();
  fibers[current].wait = Wait::DONE;
  swapcontext(&fibers[current].context, &scheduler);
}

inline void require(bool condition, const char* message) {
  if (condition) return;
  fprintf(stderr, "block emulator: %s\n", message);
  abort();
}

// All threads of a warp wait for the same. Returns whether some wait for another thing than the block's barrier, where
// those warps that have reached it stay meanwhile.
inline bool check_convergence(unsigned threads) {
  bool barrier = false, done = false, under_way = false;
  for (unsigned thread = 0; thread < threads; ++thread) {
    const Wait wait = fibers[thread].wait;
    require(wait == fibers[thread / WARP_SIZE * WARP_SIZE].wait, "a warp has diverged");
    barrier |= wait == Wait::BARRIER;
    done |= wait == Wait::DONE;
    under_way |= wait == Wait::SHUFFLE;
  }
  require(under_way || !(barrier && done), "a barrier that not all threads reach");
  return under_way;
}

inline std::vector<char> shared_bytes;  // with room to align
inline std::vector<unsigned> copiers;   // of its pieces of sixteen bytes: one more than the thread that copies there
inline std::unordered_map<const char*, const char*> copied;  // whereto, of a place in memory

template <typename T>
T* dynamic_shared() {
  const auto begin = (reinterpret_cast<uintptr_t>(shared_bytes.data()) + 15) / 16 * 16;
  return reinterpret_cast<T*>(begin);
}

inline void start_copy(void* to, const void* from, size_t bytes) {
  const char* const begin = dynamic_shared<char>();
  require(to >= begin && static_cast<char*>(to) + bytes <= shared_bytes.data() + shared_bytes.size(),
          "a copy beyond the block's shared memory");
  unsigned& copier = copiers[size_t(static_cast<char*>(to) - begin) / 16];
  require(copier == 0 || copier == current + 1, "two threads copy to the same place");
  copier = current + 1;
  const char* const source = static_cast<const char*>(from);
  const char* const target = static_cast<char*>(to);
  copied[source] = target;
  if (const auto before = copied.find(source - bytes); current % WARP_SIZE && before != copied.end())
    require(before->second == target - bytes, "neighbours in memory that a warp copies to places apart: a request each");
  for (const Copy& other : fibers[current].copies) require(other.to != to, "a copy over another");
  fibers[current].copies.push_back({to, from, bytes});
}

inline void wait_for_copies() {
  for (const Copy& copy : fibers[current].copies) memcpy(copy.to, copy.from, copy.bytes);
  fibers[current].copies.clear();
}

template <typename Function>
void launch(unsigned blocks, unsigned threads, Function kernel, unsigned shared = 0) {
  require(threads <= MAX_THREADS && threads % WARP_SIZE == 0, "threads must be whole warps, at most 1024");
  shared_bytes.assign(shared + 16, char(0xff));
  body = kernel;
  gridDim.x = blocks;
  blockDim.x = threads;
  for (blockIdx.x = 0; blockIdx.x < blocks; ++blockIdx.x) {
    copiers.assign(shared / 16 + 1, 0);
    copied.clear();
    for (unsigned thread = 0; thread < threads; ++thread) {
      Fiber& fiber = fibers[thread];
      if (!fiber.stack) fiber.stack = std::make_unique<char[]>(STACK_BYTES);
      fiber.wait = Wait::NONE;
      fiber.parity = 0;
      fiber.copies.clear();
      getcontext(&fiber.context);
      fiber.context.uc_stack.ss_sp = fiber.stack.get();
      fiber.context.uc_stack.ss_size = STACK_BYTES;
      fiber.context.uc_link = nullptr;
      makecontext(&fiber.context, enter, 0);
    }
    for (bool running = true, under_way = true; running;) {
      running = false;
      for (unsigned thread = 0; thread < threads; ++thread) {
        if (fibers[thread].wait == Wait::DONE) continue;
        if (under_way && fibers[thread].wait == Wait::BARRIER) {
          running = true;
          continue;
        }
        current = threadIdx.x = thread;
        swapcontext(&scheduler, &fibers[thread].context);
        running |= fibers[thread].wait != Wait::DONE;
      }
      under_way = check_convergence(threads);
    }
  }
}

}  // namespace emulator

inline void __syncthreads() { emulator::wait(emulator::Wait::BARRIER); }

namespace emulator {

inline float exchanged(float value, unsigned with) {
  const unsigned self = current;
  const unsigned parity = fibers[self].parity ^= 1;
  exchange[parity][self] = value;
  wait(Wait::SHUFFLE);
  return exchange[parity][with];
}

}  // namespace emulator

inline float __shfl_xor_sync(unsigned, float value, int mask) {
  return emulator::exchanged(value, emulator::current ^ unsigned(mask));
}

inline float __shfl_sync(unsigned, float value, int lane) {
  return emulator::exchanged(value, emulator::current / emulator::WARP_SIZE * emulator::WARP_SIZE + unsigned(lane));
}

inline int atomicMax(int* to, int value) {  // fibers take turns
  const int before = *to;
  *to = before < value ? value : before;
  return before;
}

// Conversions, rounding to nearest even.
struct float2 {
  float x, y;
};

struct __half2 {
  _Float16 x, y;
};

struct __nv_bfloat162 {
  uint16_t x, y;
};

inline float2 __half22float2(__half2 pair) { return {float(pair.x), float(pair.y)}; }
inline __half2 __floats2half2_rn(float x, float y) { return {_Float16(x), _Float16(y)}; }

inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) {
  const auto narrow = [](float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    if (value != value) return uint16_t(0x7fff);
    return uint16_t((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
  };
  return {narrow(x), narrow(y)};
}
