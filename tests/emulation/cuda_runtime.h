// Enough of CUDA to run this project's kernels on a CPU: what <cuda_runtime.h> and the compiler offer them, for g++ and
// clang. tests/emulated.py makes their sources fit.
//
// The threads of a block are fibers on one thread of the system. One runs until it waits for others, so that what they
// tell each other without a barrier goes wrong, and launches take turns between the first and the last thread (and
// block) going first, so that a result that depends on the order differs from call to call. __shared__ is thread_local:
// shared by the fibers of a block, of which a thread of the system has one at a time.
#pragma once

#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

#define CUDART_VERSION 13000
#define __host__
#define __device__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static thread_local

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

inline constinit thread_local dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulation {

constexpr unsigned kWarp = 32;
constexpr size_t kStack = 256 << 10, kMostDynamic = 256 << 10;

struct Barrier {
  unsigned live = 0, arrived = 0, generation = 0;

  void release() {
    arrived = 0;
    ++generation;
  }
};

struct Fiber {
  ucontext_t start;
  jmp_buf state;
  void* stack = nullptr;
  unsigned index = 0;
  bool started = false, done = false;
  const Barrier* waits = nullptr;
  unsigned generation = 0;  // of the barrier, when the wait began
  unsigned exchanges = 0, votes = 0;

  bool ready() const { return !done && (waits == nullptr || waits->generation != generation); }
};

struct Warp {
  Barrier barrier;
  uint64_t value[2][kWarp];  // of every other exchange
};

// Stacks and dynamic shared memory of a thread of the system, used again by its next block.
struct Memory {
  std::vector<void*> stacks;
  unsigned char* dynamic = static_cast<unsigned char*>(std::aligned_alloc(1024, kMostDynamic));

  void* stack(size_t i) {
    while (stacks.size() <= i) {
      void* p = mmap(nullptr, kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
      if (p == MAP_FAILED) throw std::runtime_error("emulation: no memory for a stack");
      stacks.push_back(p);
    }
    return stacks[i];
  }
  ~Memory() {
    for (void* p : stacks) munmap(p, kStack);
    std::free(dynamic);
  }
};

struct Block {
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  Barrier barrier;
  bool vote[2] = {};
  const std::function<void()>* body = nullptr;
  Fiber* running = nullptr;
  jmp_buf scheduler;
  unsigned char* dynamic = nullptr;

  Warp& warp() { return warps[running->index / kWarp]; }
};

inline constinit thread_local Block* block = nullptr;

inline void yield() {
  if (_setjmp(block->running->state) == 0) _longjmp(block->scheduler, 1);
}

// Until every living thread that the barrier counts is here; the last one does `last` before any goes on.
template <typename F>
void wait(Barrier& barrier, F last) {
  if (++barrier.arrived == barrier.live) {
    last();
    barrier.release();
    return;
  }
  Fiber& fiber = *block->running;
  fiber.waits = &barrier;
  fiber.generation = barrier.generation;
  yield();
  fiber.waits = nullptr;
}

inline void leave(Barrier& barrier) {
  if (--barrier.live > 0 && barrier.arrived == barrier.live) barrier.release();
}

inline void fiber_main() {
  (*block->body)();
  Fiber& fiber = *block->running;
  fiber.done = true;
  leave(block->warp().barrier);
  leave(block->barrier);
  _longjmp(block->scheduler, 1);
}

// Until it waits or has ended. Not inlined: what its caller holds in registers would be lost to the jump.
[[gnu::noinline]] inline void resume(Fiber& fiber) {
  block->running = &fiber;
  threadIdx = dim3(fiber.index, 0, 0);
  if (_setjmp(block->scheduler) != 0) return;
  if (fiber.started) _longjmp(fiber.state, 1);
  fiber.started = true;
  setcontext(&fiber.start);
}

// Every thread of one block, until the last has ended. blockIdx is set.
inline void run_block(const std::function<void()>& body, unsigned threads, bool descending) {
  static thread_local Memory memory;
  Block here;
  here.fibers.resize(threads);
  here.warps.resize((threads + kWarp - 1) / kWarp);
  here.barrier.live = threads;
  here.body = &body;
  here.dynamic = memory.dynamic;
  std::memset(here.dynamic, 0xa5, kMostDynamic);
  for (unsigned i = 0; i < threads; ++i) {
    Fiber& fiber = here.fibers[i];
    fiber.index = i;
    ++here.warps[i / kWarp].barrier.live;
    getcontext(&fiber.start);
    fiber.start.uc_stack.ss_sp = memory.stack(i);
    fiber.start.uc_stack.ss_size = kStack;
    fiber.start.uc_link = nullptr;
    makecontext(&fiber.start, fiber_main, 0);
  }
  block = &here;
  for (unsigned left = threads; left > 0;) {
    bool progress = false;
    for (unsigned k = 0; k < threads; ++k) {
      Fiber& fiber = here.fibers[descending ? threads - 1 - k : k];
      if (!fiber.ready()) continue;
      progress = true;
      resume(fiber);
      if (fiber.done) --left;
    }
    if (!progress) {
      std::fprintf(stderr, "emulation: threads of a block wait for a barrier that others never reach\n");
      std::abort();
    }
  }
  block = nullptr;
}

inline std::atomic<unsigned> launches{0};

struct Launch {
  dim3 grid;
  unsigned threads;
  size_t bytes;

  Launch(dim3 grid_, int64_t threads_, size_t bytes_ = 0, const void* /*stream*/ = nullptr)
      : grid(grid_), threads(static_cast<unsigned>(threads_)), bytes(bytes_) {}

  template <typename Kernel, typename... A>
  void run(const Kernel& kernel, const A&... a) const {
    run_grid([&] { kernel(a...); });
  }

  void run_grid(const std::function<void()>& body) const {
    if (bytes > kMostDynamic) throw std::runtime_error("emulation: more shared memory than any device has");
    if (threads == 0 || threads > 1024 || grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.y > 65535 ||
        grid.z > 65535) {
      throw std::runtime_error("emulation: a launch that CUDA refuses");
    }
    const bool descending = launches.fetch_add(1) % 2 == 1;
    const uint64_t blocks = uint64_t{grid.x} * grid.y * grid.z;
    for (uint64_t k = 0; k < blocks; ++k) {
      const uint64_t i = descending ? blocks - 1 - k : k;
      blockIdx = dim3(static_cast<unsigned>(i % grid.x), static_cast<unsigned>(i / grid.x % grid.y),
                      static_cast<unsigned>(i / grid.x / grid.y));
      blockDim = dim3(threads);
      gridDim = grid;
      run_block(body, threads, descending);
    }
  }
};

inline unsigned char* dynamic_shared() { return block->dynamic; }

// What another thread of the warp gives, all of them at once: from(lane) says whose value a lane takes.
template <typename T, typename From>
T exchange(T value, From from) {
  static_assert(sizeof(T) <= 8);
  Warp& warp = block->warp();
  Fiber& fiber = *block->running;
  uint64_t* slots = warp.value[fiber.exchanges++ % 2];
  const unsigned lane = fiber.index % kWarp;
  std::memcpy(&slots[lane], &value, sizeof(T));
  wait(warp.barrier, [] {});
  const unsigned source = from(lane);
  if (source < kWarp) std::memcpy(&value, &slots[source], sizeof(T));
  return value;
}

}  // namespace emulation

// ---- What kernels call ----------------------------------------------------------------------------------------------

inline void __syncthreads() {
  emulation::wait(emulation::block->barrier, [] {});
}

inline int __syncthreads_or(int predicate) {
  emulation::Block& block = *emulation::block;
  const unsigned turn = block.running->votes++ % 2;
  block.vote[turn] = block.vote[turn] || predicate != 0;
  emulation::wait(block.barrier, [&] { block.vote[1 - turn] = false; });
  return block.vote[turn];
}

inline void __syncwarp() {
  emulation::wait(emulation::block->warp().barrier, [] {});
}

template <typename T>
T __shfl_sync(unsigned, T value, int lane) {
  return emulation::exchange(value, [=](unsigned) { return static_cast<unsigned>(lane) % emulation::kWarp; });
}
template <typename T>
T __shfl_up_sync(unsigned, T value, unsigned by) {
  return emulation::exchange(value, [=](unsigned lane) { return lane >= by ? lane - by : lane; });
}
template <typename T>
T __shfl_down_sync(unsigned, T value, unsigned by) {
  return emulation::exchange(value, [=](unsigned lane) { return lane + by; });
}

inline unsigned __ballot_sync(unsigned, int predicate) {
  unsigned result = 0;
  for (unsigned k = 0; k < emulation::kWarp; ++k) {
    const int other = emulation::exchange(predicate, [=](unsigned) { return k; });
    result |= static_cast<unsigned>(other != 0) << k;
  }
  return result;
}

inline int __ffs(unsigned v) { return __builtin_ffs(static_cast<int>(v)); }
inline void __threadfence() { std::atomic_thread_fence(std::memory_order_seq_cst); }

template <typename T>
T __ldcg(const T* p) {
  return *p;
}

template <typename T>
T atomicAdd(T* p, std::type_identity_t<T> v) {
  static_assert(std::is_integral_v<T>, "sums of floats in any order are not repeatable");
  return __atomic_fetch_add(p, v, __ATOMIC_SEQ_CST);
}

template <typename A, typename B>
std::common_type_t<A, B> min(A a, B b) {
  return b < a ? std::common_type_t<A, B>(b) : std::common_type_t<A, B>(a);
}
template <typename A, typename B>
std::common_type_t<A, B> max(A a, B b) {
  return a < b ? std::common_type_t<A, B>(b) : std::common_type_t<A, B>(a);
}

// ---- What launches call ---------------------------------------------------------------------------------------------

using cudaStream_t = const void*;
enum cudaError_t { cudaSuccess };
enum cudaDeviceAttr { cudaDevAttrMaxSharedMemoryPerBlockOptin };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };

struct cudaFuncAttributes {
  size_t sharedSizeBytes;
};

// Of a device of compute capability 9.0, unless HISTODD_EMULATED_DEVICE is 7.5.
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  const char* named = std::getenv("HISTODD_EMULATED_DEVICE");
  *value = named && std::string(named) == "7.5" ? 65536 : 232448;
  return cudaSuccess;
}

template <typename F>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, F) {
  *attributes = {18432};  // a little more than any of the kernels has
  return cudaSuccess;
}

template <typename F>
cudaError_t cudaFuncSetAttribute(F, cudaFuncAttribute, int) {
  return cudaSuccess;
}

inline cudaError_t cudaMemsetAsync(void* p, int value, size_t bytes, cudaStream_t) {
  std::memset(p, value, bytes);
  return cudaSuccess;
}
