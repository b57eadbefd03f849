// The same loop as step_cpu.cpp, as one kernel launch for any number of segments and chains.
#include <cuda_runtime.h>

#include <algorithm>
#include <stdexcept>
#include <string>

#include "step.h"

namespace llc {
namespace {

constexpr int kThreads = 256;
constexpr int kQuad = 4;                     // elements of one thread at a time: one Philox counter, one 16-byte load
constexpr int kTile = kThreads * kQuad * 4;  // consecutive elements of one thread block at a time

void check(cudaError_t error, const char* operation) {
    if (error != cudaSuccess) {
        throw std::runtime_error(std::string("llc_fast: ") + operation + ": " + cudaGetErrorString(error));
    }
}

template <class T>
struct alignas(16) Quad {
    T v[kQuad];
};

__device__ inline bool aligned(const void* p) {
    return (reinterpret_cast<uintptr_t>(p) & 15u) == 0;
}

// The first segment that ends after element i.
__device__ inline int64_t find_segment(const Segment* segments, int64_t count, int64_t i) {
    int64_t low = 0, high = count;
    while (low < high) {
        const int64_t middle = (low + high) / 2;
        if (segments[middle].offset + segments[middle].length <= i) {
            low = middle + 1;
        } else {
            high = middle;
        }
    }
    return low;
}

// One element, for quads that are cut by a segment's end, masked or not aligned.
template <class Rule, class T>
__device__ void update_one(const Rule& rule, const Segment& s, int64_t chain, int64_t i, T noise) {
    const int64_t local = i - s.offset;
    if (s.mask != nullptr && s.mask[local] == 0) return;
    T* w = static_cast<T*>(s.w) + chain * s.w_stride + local;
    Coordinate<T> x{*w, static_cast<const T*>(s.grad)[chain * s.grad_stride + local],
                    static_cast<const T*>(s.anchor)[chain * s.anchor_stride + local], noise};
    rule(x);
    *w = x.w;
}

template <class Rule, class T>
__global__ void __launch_bounds__(kThreads) step_kernel(const Step step) {
    const Rule rule(step.scalars);
    const bool noisy = step.scalars.noise_level != 0;
    const int64_t first_tile = step.begin / kTile, last_tile = (step.end + kTile - 1) / kTile;

    for (int64_t tile = first_tile + blockIdx.x; tile < last_tile; tile += gridDim.x) {
        int64_t segment = find_segment(step.segments, step.num_segments, tile * kTile);
        for (int64_t i = tile * kTile + threadIdx.x * kQuad; i < (tile + 1) * kTile; i += kThreads * kQuad) {
            while (segment < step.num_segments && step.segments[segment].offset + step.segments[segment].length <= i) {
                ++segment;
            }
            if (segment == step.num_segments) break;
            const Segment& s = step.segments[segment];
            if (s.offset >= i + kQuad) continue;  // a gap

            const int64_t local = i - s.offset;
            const bool whole = local >= 0 && local + kQuad <= s.length && s.mask == nullptr;
            Quad<T> anchor;
            for (int64_t chain = 0; chain < step.num_chains; ++chain) {
                NoiseKey key = step.key;
                key.chain += uint32_t(chain);
                T noise[kQuad] = {};
                if (noisy) normals4(key, uint64_t(i) / kQuad, noise);

                T* w = static_cast<T*>(s.w) + chain * s.w_stride + local;
                const T* grad = static_cast<const T*>(s.grad) + chain * s.grad_stride + local;
                const T* anchors = static_cast<const T*>(s.anchor) + chain * s.anchor_stride + local;
                if (whole && aligned(w) && aligned(grad) && aligned(anchors)) {
                    Quad<T> value = *reinterpret_cast<const Quad<T>*>(w);
                    const Quad<T> gradient = *reinterpret_cast<const Quad<T>*>(grad);
                    // Chains that share w* read it once.
                    if (chain == 0 || s.anchor_stride != 0) anchor = *reinterpret_cast<const Quad<T>*>(anchors);
#pragma unroll
                    for (int k = 0; k < kQuad; ++k) {
                        Coordinate<T> x{value.v[k], gradient.v[k], anchor.v[k], noise[k]};
                        rule(x);
                        value.v[k] = x.w;
                    }
                    *reinterpret_cast<Quad<T>*>(w) = value;
                } else {
                    // Several short segments may share the quad, and so its noise.
                    int64_t part = segment;
#pragma unroll
                    for (int k = 0; k < kQuad; ++k) {
                        while (part < step.num_segments &&
                               step.segments[part].offset + step.segments[part].length <= i + k) {
                            ++part;
                        }
                        if (part < step.num_segments && step.segments[part].offset <= i + k) {
                            update_one(rule, step.segments[part], chain, i + k, noise[k]);
                        }
                    }
                }
            }
        }
    }
}

template <class T>
__global__ void __launch_bounds__(kThreads) normals_kernel(const Normals request) {
    const int64_t end = request.begin + request.length;
    const int64_t stride = int64_t(gridDim.x) * kThreads;
    for (int64_t quad = request.begin / kQuad + int64_t(blockIdx.x) * kThreads + threadIdx.x; quad * kQuad < end;
         quad += stride) {
        T z[kQuad];
        normals4(request.key, uint64_t(quad), z);
#pragma unroll
        for (int k = 0; k < kQuad; ++k) {
            const int64_t i = quad * kQuad + k;
            if (i >= request.begin && i < end) static_cast<T*>(request.out)[i - request.begin] = z[k];
        }
    }
}

// As many thread blocks as the device holds at once, and no more than there is work for.
template <class Kernel>
int grid_size(Kernel kernel, int64_t tiles) {
    int device = 0, processors = 0, resident = 0;
    check(cudaGetDevice(&device), "cudaGetDevice");
    check(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device), "cudaDeviceGetAttribute");
    check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&resident, kernel, kThreads, 0), "occupancy");
    return int(std::max<int64_t>(1, std::min<int64_t>(tiles, int64_t(processors) * resident)));
}

template <class Rule, class T>
void launch_step(const Step& step, cudaStream_t stream) {
    const int64_t tiles = (step.end + kTile - 1) / kTile - step.begin / kTile;
    const auto kernel = step_kernel<Rule, T>;
    kernel<<<grid_size(kernel, tiles), kThreads, 0, stream>>>(step);
    check(cudaGetLastError(), "launching the step");
}

template <class T>
void launch_normals(const Normals& request, cudaStream_t stream) {
    const int64_t quads = request.length / kQuad + 2;
    const auto kernel = normals_kernel<T>;
    kernel<<<grid_size(kernel, (quads + kThreads - 1) / kThreads), kThreads, 0, stream>>>(request);
    check(cudaGetLastError(), "launching normals");
}

}  // namespace

void cuda_step(const Step& step, void* stream) {
    const auto s = static_cast<cudaStream_t>(stream);
    switch (step.dtype) {
        case DType::float32:
            return launch_step<SGLD<float>, float>(step, s);
        case DType::float64:
            return launch_step<SGLD<double>, double>(step, s);
    }
}

void cuda_normals(const Normals& request, void* stream) {
    const auto s = static_cast<cudaStream_t>(stream);
    switch (request.dtype) {
        case DType::float32:
            return launch_normals<float>(request, s);
        case DType::float64:
            return launch_normals<double>(request, s);
    }
}

int cuda_device_count() {
    int count = 0;
    if (cudaGetDeviceCount(&count) != cudaSuccess) {
        (void)cudaGetLastError();  // no driver or no device: an answer, not an error to keep
        return 0;
    }
    return count;
}

}  // namespace llc
