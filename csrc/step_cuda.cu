// The same loop as step_cpu.cpp, as one kernel launch for any number of segments and chains.
#include <cuda_runtime.h>

#include <algorithm>
#include <stdexcept>
#include <string>

#include "quad.cuh"

namespace llc {
namespace {

void check(cudaError_t error, const char* operation) {
    if (error != cudaSuccess) {
        throw std::runtime_error(std::string("llc_fast: ") + operation + ": " + cudaGetErrorString(error));
    }
}

// How `measure` adds to a thread's sums: nothing for an element that its mask holds, and no branch.
template <class T>
struct AddToThread {
    T (&sums)[kNumSums];
    bool counted;
    LLC_HD void operator()(Sum sum, T a, T b) const { sums[sum] = counted ? fused(a, b, sums[sum]) : sums[sum]; }
};

// The part of a tile's quad at element i that lies in segment s. The loads come before the noise, whose arithmetic then
// fills the time until they arrive.
template <SumSet kSums, class Rule, class T>
__device__ inline void update_quad(const Rule& rule, Low low, bool low_reference, const View<Rule, T>& s, int i,
                                   Part part, const NoiseKey& key, uint64_t counter, bool noisy, T thermostat,
                                   T (&sums)[kNumSums]) {
    const bool whole = s.is_aligned && part.from == 0 && part.to == kQuad;
    Operands<Rule, T> o;
    if (whole) {
        o.template load<true>(s, low, low_reference, i, part);
    } else {
        o.template load<false>(s, low, low_reference, i, part);
    }
    T noise[kQuad] = {};
    if (noisy) normals4(key, counter, noise);
    o.convert(low, low_reference);

#pragma unroll
    for (int k = 0; k < kQuad; ++k) {
        Coordinate<T> x;
        x.grad = o.grad[k], x.reference = o.reference[k], x.noise = noise[k], x.w = o.w[k], x.thermostat = thermostat;
        x.preconditioner = T(1);
        if (Rule::kPreconditioned) x.preconditioner = s.preconditioner_scale * (s.preconditioner ? o.given[k] : T(1));
#pragma unroll
        for (int j = 0; j < Rule::kStates; ++j) x.state[j] = o.state[j][k];
        rule(x);
        const bool moves = o.moves(k);
        measure<kSums, Rule>(x, o.w[k], AddToThread<T>{sums, moves});
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
template <SumSet kSums, class Rule, class T>
constexpr int resident() {
    if (sizeof(T) == 8) return 1;
    if (Rule::kStates > 0) return 4 - Rule::kStates;
    return kSums == kAllSums || (kSums != 0 && Rule::kPreconditioned) ? 3 : 4;
}

// Thread block (x, y) takes every gridDim.x-th tile, and of each every gridDim.y-th chain: chain by chain, so that what
// they share, w* and perhaps the gradient, is in the cache from the second on. It leaves the tile's sums, if any, in
// step.scratch[chain][sum][tile], and 0 for those that are not wanted.
template <SumSet kSums, class Rule, class T>
__global__ void __launch_bounds__(kThreads, resident<kSums, Rule, T>()) step_kernel(const Step step) {
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
            T sums[kNumSums] = {};
            View<Rule, T> segment;
            int next = first_segment;
#pragma unroll 1
            for (int at = threadIdx.x * kQuad; at < kTile;) {
                while (segment.end <= at) segment.load(step, next++, chain, tile);
                const int i = at & ~(kQuad - 1);
                const Part part{max(at - i, min(segment.begin - i, kQuad)), min(segment.end - i, kQuad)};
                if (part.from < part.to) {
                    const uint64_t counter = uint64_t(tile * kTile + i) / kQuad;
                    update_quad<kSums>(rule, step.low, step.low_reference, segment, i, part, key, counter, noisy,
                                       thermostat, sums);
                }
                // Usually one segment covers the quad; several short ones may share it, and so its noise.
                at = i + (part.to < kQuad ? part.to : kThreads * kQuad);
            }
            if constexpr (kSums != 0) {
#pragma unroll
                for (int sum = 0; sum < kNumSums; ++sum) {
                    if (!holds(step.wanted, sum)) sums[sum] = T(0);
                }
                const int64_t tiles = last_tile - first_tile;
                block_sums(sums, step.scratch + chain * kNumSums * tiles + tile - first_tile, tiles);
            }
        }
    }
}

// Adds the tiles' sums, one thread block for a sum of a chain: a thread adds every kThreads-th tile.
__global__ void __launch_bounds__(kThreads) add_tiles(const double* scratch, int64_t tiles, double* sums) {
    double sum[1] = {0};
#pragma unroll 8
    for (int64_t tile = threadIdx.x; tile < tiles; tile += kThreads) sum[0] += scratch[blockIdx.x * tiles + tile];
    block_sums(sum, sums + blockIdx.x, 0);
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

template <SumSet kSums, class Rule, class T>
void launch(const Step& step, cudaStream_t stream, const char* operation) {
    const auto kernel = step_kernel<kSums, Rule, T>;
    const int64_t tiles = num_tiles(step), blocks = resident_blocks(kernel);
    const int64_t x = std::clamp<int64_t>(tiles, 1, blocks);
    const int64_t y = std::clamp<int64_t>(blocks / x, 1, step.num_chains);  // few tiles: chains side by side
    Step request = step;
    if (tiles == 1) request.scratch = step.sums;  // laid out alike, with nothing to add
    kernel<<<dim3(unsigned(x), unsigned(y)), kThreads, 0, stream>>>(request);
    check(cudaGetLastError(), operation);
    if (kSums != 0 && tiles > 1) {
        add_tiles<<<unsigned(step.num_chains * kNumSums), kThreads, 0, stream>>>(step.scratch, tiles, step.sums);
        check(cudaGetLastError(), operation);
    }
}

template <class Rule, class T>
void launch_with(const Step& step, cudaStream_t stream, const char* operation) {
    with_sums<Rule>(step.wanted, [&](auto sums) { launch<decltype(sums)::value, Rule, T>(step, stream, operation); });
}

template <template <class> class Rule>
void launch_as(const Step& step, cudaStream_t stream, const char* operation) {
    switch (step.dtype) {
        case DType::float32:
            return launch_with<Rule<float>, float>(step, stream, operation);
        case DType::float64:
            return launch_with<Rule<double>, double>(step, stream, operation);
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
    return num_tiles(step) * step.num_chains * kNumSums;
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
