// As much of the CUDA runtime as csrc/step_cuda.cu uses, on a CPU: a kernel's threads are fibers that take turns.
//
// A thread runs until it ends or waits for others, of its block or its warp, then another does. Blocks and threads come
// in another order, and the GPU has another number of multiprocessors, at every launch: results that follow those show
// that they do. Launches run at once; streams mean nothing.
#pragma once

#include <ucontext.h>
#include <csetjmp>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <deque>
#include <functional>
#include <numeric>
#include <random>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static  // one thread block runs at a time

using std::max;
using std::min;

using cudaError_t = int;
using cudaStream_t = void*;
enum { cudaSuccess = 0, cudaDevAttrMultiProcessorCount = 16 };

struct dim3 {
    unsigned x, y, z;
    dim3(int64_t x = 1, int64_t y = 1, int64_t z = 1) : x(unsigned(x)), y(unsigned(y)), z(unsigned(z)) {}
};

struct alignas(8) uint2 {
    unsigned x, y;
};
struct alignas(16) uint4 {
    unsigned x, y, z, w;
};
inline uint2 make_uint2(unsigned x, unsigned y) {
    return {x, y};
}
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) {
    return {x, y, z, w};
}
// There are no caches to spare.
template <class T>
T __ldcs(const T* p) {
    return *p;
}
template <class T>
void __stcs(T* p, T value) {
    *p = value;
}

inline dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace cuda_on_cpu {

[[noreturn]] inline void fail(const char* what) {
    std::fprintf(stderr, "CUDA emulation: %s\n", what);
    std::abort();
}

inline std::mt19937 chance;

// The threads of one block.
class Block {
  public:
    enum class Waits { no, for_warp, for_block, done };
    static constexpr unsigned kWarp = 32;

    static void run(unsigned threads, std::function<void()> body) {
        body_ = std::move(body);
        while (fibers_.size() < threads) make_fiber();
        for (unsigned k = 0; k < threads; ++k) fibers_[k].waits = Waits::no;
        std::vector<unsigned> order(threads);
        std::iota(order.begin(), order.end(), 0u);
        for (;;) {
            std::shuffle(order.begin(), order.end(), chance);
            for (const unsigned k : order) {
                if (fibers_[k].waits != Waits::no) continue;
                threadIdx.x = k;
                resume(fibers_[k]);
            }
            if (all(0, threads, Waits::done)) return;
            if (all(0, threads, Waits::for_block)) {
                release(0, threads);
                continue;
            }
            bool moved = false;
            for (unsigned first = 0; first < threads; first += kWarp) {
                if (!all(first, min(first + kWarp, threads), Waits::for_warp)) continue;
                release(first, min(first + kWarp, threads));
                moved = true;
            }
            // Undefined on a GPU: threads wait for others that wait elsewhere, or have left.
            if (!moved) fail("a barrier that not all threads of a block or a warp reach");
        }
    }

    // The present thread waits until the others of its block or warp do.
    static void wait(Waits how) {
        running_->waits = how;
        if (_setjmp(running_->place) == 0) _longjmp(scheduler_, 1);
    }

    template <class T>
    static T shuffle_down(T value, unsigned by) {
        static T lanes[1024];
        const unsigned thread = threadIdx.x, source = thread + by;
        lanes[thread] = value;
        wait(Waits::for_warp);
        const T found = thread % kWarp + by < kWarp ? lanes[source] : value;
        wait(Waits::for_warp);  // before the next values overwrite these
        return found;
    }

  private:
    struct Fiber {
        ucontext_t start;
        std::jmp_buf place;  // jumps, since swapping contexts calls the kernel
        Waits waits = Waits::no;
        bool started = false;
        std::vector<char> stack = std::vector<char>(1 << 16);
    };

    static bool all(unsigned first, unsigned last, Waits how) {
        const auto begin = fibers_.begin() + first, end = fibers_.begin() + last;
        return std::all_of(begin, end, [how](const Fiber& fiber) { return fiber.waits == how; });
    }

    static void release(unsigned first, unsigned last) {
        for (unsigned k = first; k < last; ++k) fibers_[k].waits = Waits::no;
    }

    static void make_fiber() {
        Fiber& fiber = fibers_.emplace_back();
        getcontext(&fiber.start);
        fiber.start.uc_stack.ss_sp = fiber.stack.data();
        fiber.start.uc_stack.ss_size = fiber.stack.size();
        makecontext(&fiber.start, &live, 0);
    }

    static void live() {
        for (;;) {
            body_();
            wait(Waits::done);
        }
    }

    static void resume(Fiber& fiber) {
        running_ = &fiber;
        if (_setjmp(scheduler_) != 0) return;
        if (fiber.started) _longjmp(fiber.place, 1);
        fiber.started = true;
        setcontext(&fiber.start);
    }

    inline static std::deque<Fiber> fibers_;  // they stay where they are
    inline static std::function<void()> body_;
    inline static std::jmp_buf scheduler_;
    inline static Fiber* running_ = nullptr;
};

// `kernel<<<grid, block, shared, stream>>>(arguments)` is rewritten to launch(grid, block, shared, stream)(kernel, …).
struct Launch {
    dim3 grid, block;

    template <class Kernel, class... Arguments>
    void operator()(Kernel kernel, Arguments... arguments) const {
        if (grid.x == 0 || grid.y == 0 || grid.z != 1) fail("an empty or a three-dimensional grid");
        if (grid.x > 0x7FFFFFFFu || grid.y > 65535u) fail("more thread blocks than a grid can have");
        if (block.x == 0 || block.x > 1024 || block.y != 1 || block.z != 1) fail("a thread block of an odd size");
        std::vector<unsigned> order(size_t(grid.x) * grid.y);
        std::iota(order.begin(), order.end(), 0u);
        std::shuffle(order.begin(), order.end(), chance);
        gridDim = grid, blockDim = block;
        for (const unsigned index : order) {
            blockIdx = dim3(index % grid.x, index / grid.x);
            Block::run(block.x, [&] { kernel(arguments...); });
        }
    }
};

inline Launch launch(dim3 grid, dim3 block, size_t = 0, cudaStream_t = nullptr) {
    return {grid, block};
}

}  // namespace cuda_on_cpu

inline void __syncthreads() {
    cuda_on_cpu::Block::wait(cuda_on_cpu::Block::Waits::for_block);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned by) {
    if (mask != 0xFFFFFFFFu) cuda_on_cpu::fail("a shuffle of part of a warp");
    return cuda_on_cpu::Block::shuffle_down(value, by);
}

inline cudaError_t cudaGetLastError() {
    return cudaSuccess;
}
inline const char* cudaGetErrorString(cudaError_t) {
    return "no error";
}
inline cudaError_t cudaGetDevice(int* device) {
    *device = 0;
    return cudaSuccess;
}
inline cudaError_t cudaGetDeviceCount(int* count) {
    *count = 1;
    return cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int* processors, int, int) {
    *processors = 1 + int(cuda_on_cpu::chance() % 8);
    return cudaSuccess;
}
template <class Kernel>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, Kernel, int, size_t) {
    *blocks = 2;
    return cudaSuccess;
}
