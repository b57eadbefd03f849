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

// Whether quads at p can be moved in the widest accesses (16 bytes, or 8 for low precision).
template <class T>
__device__ inline bool aligned(const T* p) {
    return (reinterpret_cast<uintptr_t>(p) & (alignof(Quad<T>) - 1)) == 0;
}

// The first segment that ends after element i.
__device__ inline int find_segment(const Segment* segments, int count, int64_t i) {
    int low = 0, high = count;
    while (low < high) {
        const int middle = (low + high) / 2;
        if (segments[middle].offset + segments[middle].length <= i) {
            low = middle + 1;
        } else {
            high = middle;
        }
    }
    return low;
}

// Elements [from, to) of a quad.
struct Part {
    int from, to;
    __device__ bool has(int k) const { return k >= from && k < to; }
    __device__ uint32_t mask() const { return ~0u << 8 * from & ~0u >> 8 * (kQuad - to); }  // a byte for each element
};

__device__ inline int clamp(int64_t x, int high) {
    return x < 0 ? 0 : x > high ? high : int(x);
}

// Whole quads, at aligned addresses, are one access.
template <bool kWhole, class T>
__device__ inline void load_quad(T (&out)[kQuad], const T* p, Part part) {
    if (kWhole) {
        const Quad<T> quad = *reinterpret_cast<const Quad<T>*>(p);
#pragma unroll
        for (int k = 0; k < kQuad; ++k) out[k] = quad.v[k];
    } else {
#pragma unroll
        for (int k = 0; k < kQuad; ++k) out[k] = part.has(k) ? p[k] : T(0);
    }
}

template <bool kWhole, class T>
__device__ inline void store_quad(T* p, const T (&in)[kQuad], Part part) {
    if (kWhole) {
        Quad<T> quad;
#pragma unroll
        for (int k = 0; k < kQuad; ++k) quad.v[k] = in[k];
        *reinterpret_cast<Quad<T>*>(p) = quad;
    } else {
#pragma unroll
        for (int k = 0; k < kQuad; ++k) {
            if (part.has(k)) p[k] = in[k];
        }
    }
}

// What one chain has of a segment inside a tile, as a thread keeps it in registers until it gets to the next segment:
// with the table read for every quad, the latency of those loads would come before that of the data's.
template <class Rule, class T>
struct View {
    int begin = 0, end = 0;  // in the tile, whose first element all addresses are of
    T *w, *state[2];
    const T *anchor, *preconditioner;
    const void* grad;  // of T or of low precision
    const uint8_t* mask;
    uint16_t* copy;
    T preconditioner_scale;
    bool is_aligned;

    __device__ void load(const Step& step, int index, int64_t chain, int64_t tile) {
        begin = end = kTile;  // behind the last segment
        if (index >= step.num_segments) return;
        const Segment& s = step.segments[index];
        const int64_t start = tile * kTile - s.offset, row = chain * s.stride + start;
        begin = clamp(-start, kTile), end = clamp(s.length - start, kTile);
        w = static_cast<T*>(s.w) + row;
        anchor = static_cast<const T*>(s.anchor) + chain * s.anchor_stride + start;
        is_aligned = aligned(w) && aligned(anchor);
        const int64_t grad_row = chain * s.grad_stride + start;
        if (step.low == Low::none) {
            grad = static_cast<const T*>(s.grad) + grad_row;
            is_aligned = is_aligned && aligned(static_cast<const T*>(grad));
        } else {
            grad = static_cast<const uint16_t*>(s.grad) + grad_row;
            is_aligned = is_aligned && aligned(static_cast<const uint16_t*>(grad));
        }
#pragma unroll
        for (int k = 0; k < Rule::kStates; ++k) {
            state[k] = static_cast<T*>(s.state[k]) + row;
            is_aligned = is_aligned && aligned(state[k]);
        }
        mask = s.mask ? s.mask + start : nullptr;
        copy = s.copy ? static_cast<uint16_t*>(s.copy) + row : nullptr;
        is_aligned = is_aligned && aligned(mask) && aligned(copy);
        if (Rule::kPreconditioned) {
            preconditioner = s.preconditioner ? static_cast<const T*>(s.preconditioner) + start : nullptr;
            preconditioner_scale = T(s.preconditioner_scale);
            is_aligned = is_aligned && aligned(preconditioner);
        }
    }
};

// What a step reads of a quad, and what it writes.
template <class Rule, class T>
struct Operands {
    T w[kQuad], grad[kQuad], anchor[kQuad], given[kQuad], state[2][kQuad];
    uint32_t mask;  // four bytes; 0: the element stays

    template <bool kWhole>
    __device__ void load(const View<Rule, T>& s, Low low, int i, Part part) {
        load_quad<kWhole>(w, s.w + i, part);
        load_quad<kWhole>(anchor, s.anchor + i, part);
#pragma unroll
        for (int k = 0; k < Rule::kStates; ++k) load_quad<kWhole>(state[k], s.state[k] + i, part);
        if (Rule::kPreconditioned && s.preconditioner) load_quad<kWhole>(given, s.preconditioner + i, part);
        if (low == Low::none) {
            load_quad<kWhole>(grad, static_cast<const T*>(s.grad) + i, part);
        } else {  // as they are: to convert them would be to wait for them
            uint16_t bits[kQuad];
            load_quad<kWhole>(bits, static_cast<const uint16_t*>(s.grad) + i, part);
            memcpy(grad, bits, sizeof(bits));
        }
        mask = kWhole ? ~0u : part.mask();
        if (s.mask) {
            uint8_t bytes[kQuad];
            load_quad<kWhole>(bytes, s.mask + i, part);
            memcpy(&mask, bytes, sizeof(mask));
        }
    }

    __device__ bool moves(int k) const { return mask >> 8 * k & 0xFFu; }

    __device__ void convert_grad(Low low) {
        if (low == Low::none) return;
        uint16_t bits[kQuad];
        memcpy(bits, grad, sizeof(bits));
#pragma unroll
        for (int k = 0; k < kQuad; ++k) grad[k] = T(from_low(bits[k], low));
    }

    template <bool kWhole>
    __device__ void store(const View<Rule, T>& s, Low low, int i, Part part) const {
        store_quad<kWhole>(s.w + i, w, part);
#pragma unroll
        for (int k = 0; k < Rule::kStates; ++k) store_quad<kWhole>(s.state[k] + i, state[k], part);
        if (s.copy) {
            uint16_t bits[kQuad];
#pragma unroll
            for (int k = 0; k < kQuad; ++k) bits[k] = to_low(float(w[k]), low);
            store_quad<kWhole>(s.copy + i, bits, part);
        }
    }
};

// The part of a tile's quad at element i that lies in segment s. The loads come before the noise, whose arithmetic then
// fills the time until they arrive. Adds to `sums` if metrics are wanted.
template <class Rule, class T, bool kMeasure>
__device__ inline void update_quad(const Rule& rule, Low low, const View<Rule, T>& s, int i, Part part,
                                   const NoiseKey& key, uint64_t counter, bool noisy, T thermostat,
                                   T (&sums)[kNumMetrics]) {
    const bool whole = s.is_aligned && part.from == 0 && part.to == kQuad;
    Operands<Rule, T> o;
    if (whole) {
        o.template load<true>(s, low, i, part);
    } else {
        o.template load<false>(s, low, i, part);
    }
    T noise[kQuad] = {};
    if (noisy) normals4(key, counter, noise);
    o.convert_grad(low);

#pragma unroll
    for (int k = 0; k < kQuad; ++k) {
        Coordinate<T> x;
        x.grad = o.grad[k], x.anchor = o.anchor[k], x.noise = noise[k], x.w = o.w[k], x.thermostat = thermostat;
        x.preconditioner = T(1);
        if (Rule::kPreconditioned) x.preconditioner = s.preconditioner_scale * (s.preconditioner ? o.given[k] : T(1));
#pragma unroll
        for (int j = 0; j < Rule::kStates; ++j) x.state[j] = o.state[j][k];
        rule(x);
        const bool moves = o.moves(k);
        if (kMeasure) {
            const T distance = o.w[k] - x.anchor;
            const auto add = [&](Metric metric, T a, T b) {
                sums[metric] = moves ? fused(a, b, sums[metric]) : sums[metric];  // no branch
            };
            add(kGradSquare, x.grad, x.grad);
            add(kDistanceSquare, distance, distance);
            add(kWeightSquare, x.w, x.w);
            add(kNoiseSquare, x.noise, x.noise);
            add(kDriftSquare, x.scale * x.drift, x.drift);
            add(kDriftNoise, root(x.scale) * x.drift, x.noise);
            add(kHeat, x.grad, x.heat);
            if (Rule::kStates > 0) add(kMomentumSquare, x.state[0], x.state[0]);
        }
        if (moves) o.w[k] = x.w;
#pragma unroll
        for (int j = 0; j < Rule::kStates; ++j) o.state[j][k] = x.state[j];
    }

    if (whole) {
        o.template store<true>(s, low, i, part);
    } else {
        o.template store<false>(s, low, i, part);
    }
}

// Adds each of kCount values over the thread block: to out[0], out[stride], ... Called by all threads. The order, and
// with it the bits, are fixed: warp m takes value m, a lane every 32nd thread's, then lanes pairwise.
template <int kCount, class T>
__device__ inline void block_sums(const T (&values)[kCount], double* out, int64_t stride) {
    constexpr int kWarp = 32;
    static_assert(kCount * kWarp <= kThreads, "a warp for each value");
    __shared__ T shared[kCount][kThreads];
#pragma unroll
    for (int m = 0; m < kCount; ++m) shared[m][threadIdx.x] = values[m];
    __syncthreads();
    const int m = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
    if (m < kCount) {
        double sum = 0;
#pragma unroll
        for (int k = 0; k < kThreads; k += kWarp) sum += double(shared[m][k + lane]);
        for (int width = kWarp / 2; width > 0; width /= 2) sum += __shfl_down_sync(0xFFFFFFFFu, sum, width);
        if (lane == 0) out[m * stride] = sum;
    }
    __syncthreads();  // before the next values overwrite these
}

// Thread blocks that ptxas shall make room for on a multiprocessor: as many as it can without spilling registers.
template <class Rule, class T, bool kMeasure>
constexpr int kResident = sizeof(T) == 8 ? 1 : (kMeasure && Rule::kStates == 0 ? 3 : 4 - Rule::kStates);

// Thread block (x, y) takes every gridDim.x-th tile, and of each every gridDim.y-th chain: chain by chain, so that what
// they share, w* and perhaps the gradient, is in the cache from the second on. With kMeasure it leaves the tile's sums
// in step.scratch[chain][metric][tile].
template <class Rule, class T, bool kMeasure>
__global__ void __launch_bounds__(kThreads, kResident<Rule, T, kMeasure>) step_kernel(const Step step) {
    const Scalars scalars = step.device_scalars ? *step.device_scalars : step.scalars;
    NoiseKey key = step.key;
    if (step.device_step) key.step = uint64_t(*step.device_step);
    const Rule rule(scalars, key.step);
    const bool noisy = T(scalars.noise_level) != 0;
    const int64_t first_tile = step.begin / kTile, last_tile = (step.end + kTile - 1) / kTile;

    for (int64_t tile = first_tile + blockIdx.x; tile < last_tile; tile += gridDim.x) {
        const int first_segment = find_segment(step.segments, int(step.num_segments), tile * kTile);
        for (int64_t chain = blockIdx.y; chain < step.num_chains; chain += gridDim.y) {
            key.chain = step.key.chain + uint32_t(chain);
            const T thermostat = step.thermostat ? T(step.thermostat[chain]) : T(0);
            T sums[kNumMetrics] = {};
            View<Rule, T> segment;
            int next = first_segment;
#pragma unroll 1
            for (int at = threadIdx.x * kQuad; at < kTile;) {
                while (segment.end <= at) segment.load(step, next++, chain, tile);
                const int i = at & ~(kQuad - 1);
                const Part part{max(at - i, min(segment.begin - i, kQuad)), min(segment.end - i, kQuad)};
                if (part.from < part.to) {
                    const uint64_t counter = uint64_t(tile * kTile + i) / kQuad;
                    update_quad<Rule, T, kMeasure>(rule, step.low, segment, i, part, key, counter, noisy, thermostat,
                                                   sums);
                }
                // Usually one segment covers the quad; several short ones may share it, and so its noise.
                at = i + (part.to < kQuad ? part.to : kThreads * kQuad);
            }
            if (kMeasure) {
                const int64_t tiles = last_tile - first_tile;
                block_sums(sums, step.scratch + chain * kNumMetrics * tiles + tile - first_tile, tiles);
            }
        }
    }
}

// Adds the tiles' sums, one thread block for a metric of a chain: a thread adds every kThreads-th tile.
__global__ void __launch_bounds__(kThreads) sum_metrics(const double* scratch, int64_t tiles, double* metrics) {
    double sum[1] = {0};
#pragma unroll 8
    for (int64_t tile = threadIdx.x; tile < tiles; tile += kThreads) sum[0] += scratch[blockIdx.x * tiles + tile];
    block_sums(sum, metrics + blockIdx.x, 0);
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

// Thread blocks that the device holds at once.
template <class Kernel>
int64_t resident_blocks(Kernel kernel) {
    int device = 0, processors = 0, resident = 0;
    check(cudaGetDevice(&device), "cudaGetDevice");
    check(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device), "cudaDeviceGetAttribute");
    check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&resident, kernel, kThreads, 0), "occupancy");
    return std::max<int64_t>(1, int64_t(processors) * resident);
}

int64_t num_tiles(const Step& step) {
    return (step.end + kTile - 1) / kTile - step.begin / kTile;
}

template <class Rule, class T>
void launch(const Step& step, cudaStream_t stream, const char* operation) {
    const auto kernel = step.metrics ? step_kernel<Rule, T, true> : step_kernel<Rule, T, false>;
    const int64_t tiles = num_tiles(step), blocks = resident_blocks(kernel);
    const int64_t x = std::clamp<int64_t>(tiles, 1, blocks);
    const int64_t y = std::clamp<int64_t>(blocks / x, 1, step.num_chains);  // few tiles: chains side by side
    Step request = step;
    if (tiles == 1) request.scratch = step.metrics;  // laid out alike, with nothing to add
    kernel<<<dim3(unsigned(x), unsigned(y)), kThreads, 0, stream>>>(request);
    check(cudaGetLastError(), operation);
    if (step.metrics && tiles > 1) {
        sum_metrics<<<unsigned(step.num_chains * kNumMetrics), kThreads, 0, stream>>>(step.scratch, tiles,
                                                                                      step.metrics);
        check(cudaGetLastError(), operation);
    }
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
    const int64_t blocks = std::min((quads + kThreads - 1) / kThreads, resident_blocks(kernel));
    kernel<<<unsigned(blocks), kThreads, 0, stream>>>(request);
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
