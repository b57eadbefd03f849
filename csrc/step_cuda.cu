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
struct alignas(sizeof(T) * kQuad < 16 ? sizeof(T) * kQuad : 16) Quad {
    T v[kQuad];
};

// Whether a quad at p can be moved in the widest loads (16 bytes, or 8 for low precision).
template <class T>
__device__ inline bool aligned(const T* p) {
    return (reinterpret_cast<uintptr_t>(p) & (alignof(Quad<T>) - 1)) == 0;
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

// Four elements of one operand, of which [from, to) exist. Whole, aligned quads are one load.
template <class T>
__device__ inline void load_quad(T (&out)[kQuad], const T* p, int from, int to) {
    if (from == 0 && to == kQuad && aligned(p)) {
        const Quad<T> quad = *reinterpret_cast<const Quad<T>*>(p);
#pragma unroll
        for (int k = 0; k < kQuad; ++k) out[k] = quad.v[k];
    } else {
#pragma unroll
        for (int k = 0; k < kQuad; ++k) out[k] = k >= from && k < to ? p[k] : T(0);
    }
}

template <class T>
__device__ inline void store_quad(T* p, const T (&in)[kQuad], int from, int to) {
    if (from == 0 && to == kQuad && aligned(p)) {
        Quad<T> quad;
#pragma unroll
        for (int k = 0; k < kQuad; ++k) quad.v[k] = in[k];
        *reinterpret_cast<Quad<T>*>(p) = quad;
    } else {
#pragma unroll
        for (int k = 0; k < kQuad; ++k) {
            if (k >= from && k < to) p[k] = in[k];
        }
    }
}

// Elements [from, to) of the quad at flat index i, which lie in segment s, for one chain. `anchor` holds the quad's
// w* across chains that share it: it is loaded for the `first` of them. Adds to `sums` if metrics are wanted.
template <class Rule, class T, bool kMeasure>
__device__ inline void update_quad(const Rule& rule, const Step& step, const Segment& s, int64_t i, int from, int to,
                                   int64_t chain, bool first, const T (&noise)[kQuad], T (&anchor)[kQuad], T* sums) {
    const int64_t local = i - s.offset, row = chain * s.stride + local;
    T w[kQuad], grad[kQuad], state[2][kQuad], given[kQuad];
    load_quad(w, static_cast<const T*>(s.w) + row, from, to);
    if (step.low == Low::none) {
        load_quad(grad, static_cast<const T*>(s.grad) + chain * s.grad_stride + local, from, to);
    } else {
        uint16_t bits[kQuad];
        load_quad(bits, static_cast<const uint16_t*>(s.grad) + chain * s.grad_stride + local, from, to);
#pragma unroll
        for (int k = 0; k < kQuad; ++k) grad[k] = T(from_low(bits[k], step.low));
    }
    if (first || s.anchor_stride != 0) {
        load_quad(anchor, static_cast<const T*>(s.anchor) + chain * s.anchor_stride + local, from, to);
    }
#pragma unroll
    for (int k = 0; k < Rule::kStates; ++k) load_quad(state[k], static_cast<const T*>(s.state[k]) + row, from, to);
    if (Rule::kPreconditioned && s.preconditioner) {
        load_quad(given, static_cast<const T*>(s.preconditioner) + local, from, to);
    }
    const T thermostat = step.thermostat ? T(step.thermostat[chain]) : T(0);

#pragma unroll
    for (int k = 0; k < kQuad; ++k) {
        const bool moves = k >= from && k < to && (!s.mask || s.mask[local + k]);
        Coordinate<T> x;
        x.grad = grad[k], x.anchor = anchor[k], x.noise = noise[k], x.w = w[k], x.thermostat = thermostat;
        x.preconditioner = T(1);
        if (Rule::kPreconditioned) x.preconditioner = T(s.preconditioner_scale) * (s.preconditioner ? given[k] : T(1));
#pragma unroll
        for (int j = 0; j < Rule::kStates; ++j) x.state[j] = state[j][k];
        rule(x);
        if (kMeasure && moves) {
            const T distance = w[k] - anchor[k];
            sums[kGradSquare] += x.grad * x.grad;
            sums[kDistanceSquare] += distance * distance;
            sums[kWeightSquare] += x.w * x.w;
            sums[kNoiseSquare] += x.noise * x.noise;
            sums[kDriftSquare] += x.scale * x.drift * x.drift;
            sums[kDriftNoise] += root(x.scale) * x.drift * x.noise;
            sums[kHeat] += x.grad * x.heat;
            if (Rule::kStates > 0) sums[kMomentumSquare] += x.state[0] * x.state[0];
        }
        if (moves) w[k] = x.w;
#pragma unroll
        for (int j = 0; j < Rule::kStates; ++j) state[j][k] = x.state[j];
    }

    store_quad(static_cast<T*>(s.w) + row, w, from, to);
#pragma unroll
    for (int k = 0; k < Rule::kStates; ++k) store_quad(static_cast<T*>(s.state[k]) + row, state[k], from, to);
    if (s.copy) {
        uint16_t bits[kQuad];
#pragma unroll
        for (int k = 0; k < kQuad; ++k) bits[k] = to_low(float(w[k]), step.low);
        store_quad(static_cast<uint16_t*>(s.copy) + row, bits, from, to);
    }
}

// The sum over the thread block, in thread 0 (0 in the others): a tree, so that the order, and with it the bits, are
// fixed.
__device__ inline double block_sum(double value) {
    __shared__ double shared[kThreads];
    shared[threadIdx.x] = value;
    for (int width = kThreads / 2; width > 0; width /= 2) {
        __syncthreads();
        if (threadIdx.x < width) shared[threadIdx.x] += shared[threadIdx.x + width];
    }
    const double sum = threadIdx.x == 0 ? shared[0] : 0.0;  // only the thread that wrote it last may read it
    __syncthreads();                                        // before the next sum overwrites it
    return sum;
}

// Thread block `blockIdx.x` takes every gridDim.x-th tile. With kMeasure it handles one chain (blockIdx.y) and leaves
// that tile's sums in step.scratch[chain][tile][metric]; without, it handles all chains, so that they share w*.
// The bound's 1 tells ptxas to take the registers it needs: left to itself it spills a few to round occupancy up.
template <class Rule, class T, bool kMeasure>
__global__ void __launch_bounds__(kThreads, 1) step_kernel(const Step step) {
    const Scalars scalars = step.device_scalars ? *step.device_scalars : step.scalars;
    NoiseKey key = step.key;
    if (step.device_step) key.step = uint64_t(*step.device_step);
    const Rule rule(scalars, key.step);
    const bool noisy = scalars.noise_level != 0;
    const int64_t first_tile = step.begin / kTile, last_tile = (step.end + kTile - 1) / kTile;
    const int64_t first_chain = kMeasure ? blockIdx.y : 0, last_chain = kMeasure ? blockIdx.y + 1 : step.num_chains;

    for (int64_t tile = first_tile + blockIdx.x; tile < last_tile; tile += gridDim.x) {
        T sums[kNumMetrics] = {};
        int64_t segment = find_segment(step.segments, step.num_segments, tile * kTile);
        for (int64_t i = tile * kTile + threadIdx.x * kQuad; i < (tile + 1) * kTile; i += kThreads * kQuad) {
            while (segment < step.num_segments && step.segments[segment].offset + step.segments[segment].length <= i) {
                ++segment;
            }
            // Usually one segment covers the quad; several short ones may share it, and so its noise.
            for (int64_t part = segment; part < step.num_segments && step.segments[part].offset < i + kQuad; ++part) {
                const Segment& s = step.segments[part];
                const int from = int(max(s.offset - i, int64_t(0)));
                const int to = int(min(s.offset + s.length - i, int64_t(kQuad)));
                if (from >= to) continue;
                T anchor[kQuad];
                for (int64_t chain = first_chain; chain < last_chain; ++chain) {
                    NoiseKey chain_key = key;
                    chain_key.chain += uint32_t(chain);
                    T noise[kQuad] = {};
                    if (noisy) normals4(chain_key, uint64_t(i) / kQuad, noise);
                    update_quad<Rule, T, kMeasure>(rule, step, s, i, from, to, chain, chain == first_chain, noise,
                                                   anchor, sums);
                }
            }
        }
        if (kMeasure) {
            double* out = step.scratch + (blockIdx.y * (last_tile - first_tile) + tile - first_tile) * kNumMetrics;
#pragma unroll
            for (int metric = 0; metric < kNumMetrics; ++metric) {
                const double sum = block_sum(sums[metric]);
                if (threadIdx.x == 0) out[metric] = sum;
            }
        }
    }
}

// Adds the tiles' sums, one thread block a chain: a thread adds every kThreads-th tile, then a tree adds the threads.
__global__ void __launch_bounds__(kThreads) sum_metrics(const double* scratch, int64_t tiles, double* metrics) {
    const int64_t chain = blockIdx.x;
    for (int metric = 0; metric < kNumMetrics; ++metric) {
        double sum = 0;
        for (int64_t tile = threadIdx.x; tile < tiles; tile += kThreads) {
            sum += scratch[(chain * tiles + tile) * kNumMetrics + metric];
        }
        sum = block_sum(sum);
        if (threadIdx.x == 0) metrics[chain * kNumMetrics + metric] = sum;
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

__global__ void __launch_bounds__(kThreads) minibatch_kernel(const Minibatch batch) {
    const uint64_t step = batch.device_step ? uint64_t(*batch.device_step) : batch.key.step;
    const int64_t chain = blockIdx.y;
    uint64_t first;
    const Permutation order = minibatch_order(batch, step, chain, first);
    for (int64_t k = int64_t(blockIdx.x) * kThreads + threadIdx.x; k < batch.batch_size;
         k += int64_t(gridDim.x) * kThreads) {
        batch.out[chain * batch.batch_size + k] = int64_t(order.walk(order.once(first + uint64_t(k))));
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

int64_t num_tiles(const Step& step) {
    return (step.end + kTile - 1) / kTile - step.begin / kTile;
}

template <class Rule, class T>
void launch(const Step& step, cudaStream_t stream, const char* operation) {
    const int64_t tiles = num_tiles(step);
    if (step.metrics) {
        const auto kernel = step_kernel<Rule, T, true>;
        const dim3 grid(unsigned(grid_size(kernel, tiles)), unsigned(step.num_chains));
        kernel<<<grid, kThreads, 0, stream>>>(step);
        check(cudaGetLastError(), operation);
        sum_metrics<<<unsigned(step.num_chains), kThreads, 0, stream>>>(step.scratch, tiles, step.metrics);
    } else {
        const auto kernel = step_kernel<Rule, T, false>;
        kernel<<<grid_size(kernel, tiles), kThreads, 0, stream>>>(step);
    }
    check(cudaGetLastError(), operation);
}

template <template <class> class Rule>
void launch_as(const Step& step, cudaStream_t stream, const char* operation) {
    switch (step.dtype) {
        case DType::float32:
            return launch<Rule<float>, float>(step, stream, operation);
        case DType::float64:
            return launch<Rule<double>, double>(step, stream, operation);
    }
}

template <class T>
void launch_normals(const Normals& request, cudaStream_t stream) {
    const int64_t quads = request.length / kQuad + 2;
    const auto kernel = normals_kernel<T>;
    kernel<<<grid_size(kernel, (quads + kThreads - 1) / kThreads), kThreads, 0, stream>>>(request);
    check(cudaGetLastError(), "launching normals");
}

}  // namespace

int64_t cuda_scratch_size(const Step& step) {
    return num_tiles(step) * step.num_chains * kNumMetrics;
}

void cuda_step(const Step& step, void* stream) {
    const auto s = static_cast<cudaStream_t>(stream);
    switch (step.rule) {
#define LLC_CASE(type, name) \
    case Rule::type:         \
        return launch_as<type>(step, s, "step " name);
        LLC_RULES(LLC_CASE)
#undef LLC_CASE
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

void cuda_minibatch(const Minibatch& batch, void* stream) {
    const int64_t blocks = std::min<int64_t>((batch.batch_size + kThreads - 1) / kThreads, 1024);
    const dim3 grid(static_cast<unsigned>(blocks), static_cast<unsigned>(batch.num_chains));
    minibatch_kernel<<<grid, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(batch);
    check(cudaGetLastError(), "launching minibatch indices");
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
