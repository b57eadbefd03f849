// The SIMD loop over segments and chains. Compiled once per instruction set, with LLC_ISA naming it.
#include <algorithm>
#include <cstring>

#include "step.h"

#if defined(__SSE2__)
// GCC 12 warns of its own header's way to say "undefined".
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop
#endif

namespace llc {
inline namespace LLC_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif
using Lanes = uint64_t __attribute__((vector_size(kVectorBytes)));
constexpr int kLanes = kVectorBytes / 8;

// Compilers do not see that a 64-bit product of masked lanes is the one-instruction widening multiply.
struct VectorMultiply {
    LLC_HD Lanes operator()(Lanes lanes, uint32_t m) const {
#if defined(__AVX512F__)
        return reinterpret_cast<Lanes>(_mm512_mul_epu32(reinterpret_cast<__m512i>(lanes), _mm512_set1_epi64(m)));
#elif defined(__AVX2__)
        return reinterpret_cast<Lanes>(_mm256_mul_epu32(reinterpret_cast<__m256i>(lanes), _mm256_set1_epi64x(m)));
#elif defined(__SSE2__)
        return reinterpret_cast<Lanes>(_mm_mul_epu32(reinterpret_cast<__m128i>(lanes), _mm_set1_epi64x(m)));
#else
        return (lanes & 0xFFFFFFFFu) * m;
#endif
    }
};

// The loop works on blocks of the flat parameter vector: a block's noise is made in the first-level cache,
// then used by every segment that reaches into the block. 512 floats are 2 KiB: large enough to amortize the
// calls, small enough that the arithmetic of one block overlaps with the memory traffic of the next.
constexpr int64_t kBlock = 512;

// The normals of elements [block * kBlock, (block + 1) * kBlock).
template <class T>
void fill_block(T* z, const NoiseKey& key, int64_t block) {
    constexpr int kCounters = 2 * kLanes;  // per iteration: even counters in one vector, odd ones in another
    const uint64_t first = uint64_t(block) * (kBlock / 4);
    const Lanes word1 = Lanes{} + counter_word1(key), word2 = Lanes{} + counter_word2(key);
    const Lanes word3 = Lanes{} + counter_word3(key, first);  // a block never straddles a multiple of 2^32
    Lanes lane{};
    for (int i = 0; i < kLanes; ++i) lane[i] = uint64_t(2 * i);

    for (int64_t start = 0; start < kBlock / 4; start += kCounters) {
        Lanes even[4] = {lane + (first + start), word1, word2, word3};
        Lanes odd[4] = {lane + (first + start + 1), word1, word2, word3};
        philox(even[0], even[1], even[2], even[3], key.seed, VectorMultiply{});
        philox(odd[0], odd[1], odd[2], odd[3], key.seed, VectorMultiply{});

        alignas(64) uint32_t words[4][kCounters];
        for (int j = 0; j < 4; ++j) {
            const Lanes merged = (even[j] & 0xFFFFFFFFu) | (odd[j] << 32);  // little-endian: counters in order
            std::memcpy(words[j], &merged, sizeof(merged));
        }
        T* out = z + 4 * start;
#pragma omp simd
        for (int i = 0; i < kCounters; ++i) {
            box_muller(words[0][i], words[1][i], out[4 * i], out[4 * i + 1]);
            box_muller(words[2][i], words[3][i], out[4 * i + 2], out[4 * i + 3]);
        }
    }
}

// One rule over n elements of one segment in one chain. `anchor` may be `w`.
template <class Rule, class T>
void update(const Rule& rule, T* w, const T* grad, const T* anchor, const T* noise, int64_t n) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) {
        Coordinate<T> x{w[i], grad[i], anchor[i], noise[i]};
        rule(x);
        w[i] = x.w;
    }
}

// The part of `segment` inside [begin, end), in chain `chain`; `noise` belongs to `begin`'s block.
template <class Rule, class T>
void update_segment(const Rule& rule, const Segment& segment, int64_t chain, int64_t block, const T* noise) {
    const int64_t begin = std::max(segment.offset, block * kBlock);
    const int64_t end = std::min(segment.offset + segment.length, (block + 1) * kBlock);
    const int64_t n = end - begin, local = begin - segment.offset;
    T* w = static_cast<T*>(segment.w) + chain * segment.w_stride + local;
    const T* grad = static_cast<const T*>(segment.grad) + chain * segment.grad_stride + local;
    const T* anchor = static_cast<const T*>(segment.anchor) + chain * segment.anchor_stride + local;
    const T* z = noise + (begin - block * kBlock);
    if (segment.mask == nullptr) {
        update(rule, w, grad, anchor, z, n);
        return;
    }
    // Masked: keep the block's old values (in the first-level cache) and put back what must not move.
    alignas(64) T kept[kBlock];
    std::memcpy(kept, w, sizeof(T) * n);
    update(rule, w, grad, anchor, z, n);
    const uint8_t* mask = segment.mask + local;
    for (int64_t i = 0; i < n; ++i) w[i] = mask[i] ? w[i] : kept[i];
}

// Blocks [first, last) of all chains. Chains are innermost: their common anchor is then read from memory
// once.
template <class Rule, class T>
void run_blocks(const Step& step, int64_t first, int64_t last) {
    const Rule rule(step.scalars);
    const bool noisy = step.scalars.noise_level != 0;
    alignas(64) T noise[kBlock] = {};
    const Segment *segment = step.segments, *const stop = segment + step.num_segments;
    segment =
        std::partition_point(segment, stop, [&](const Segment& s) { return s.offset + s.length <= first * kBlock; });

    for (int64_t block = first; block < last; ++block) {
        while (segment != stop && segment->offset + segment->length <= block * kBlock) ++segment;
        if (segment == stop) return;
        if (segment->offset >= (block + 1) * kBlock) {  // a gap: go on where the next segment starts
            block = segment->offset / kBlock - 1;
            continue;
        }
        for (int64_t chain = 0; chain < step.num_chains; ++chain) {
            NoiseKey key = step.key;
            key.chain += uint32_t(chain);
            if (noisy) fill_block(noise, key, block);
            for (auto s = segment; s != stop && s->offset < (block + 1) * kBlock; ++s) {
                update_segment(rule, *s, chain, block, noise);
            }
        }
    }
}

template <class Rule, class T>
void run(const Step& step, int num_threads) {
    const int64_t first = step.begin / kBlock, last = (step.end + kBlock - 1) / kBlock;
    // A thread that has less than this to do costs more than it saves.
    constexpr int64_t kBlocksPerThread = 32;
    const int64_t work = (last - first) * step.num_chains;
    const int threads = int(std::max<int64_t>(1, std::min<int64_t>(num_threads, work / kBlocksPerThread)));
    if (threads == 1) {  // not even an empty parallel region: small steps must stay cheap
        run_blocks<Rule, T>(step, first, last);
        return;
    }
#pragma omp parallel for num_threads(threads) schedule(static, 1)
    for (int t = 0; t < threads; ++t) {
        run_blocks<Rule, T>(step, first + (last - first) * t / threads, first + (last - first) * (t + 1) / threads);
    }
}

void step(const Step& s, int num_threads) {
    switch (s.dtype) {
        case DType::float32:
            return run<SGLD<float>, float>(s, num_threads);
        case DType::float64:
            return run<SGLD<double>, double>(s, num_threads);
    }
}

template <class T>
void write_normals(const Normals& request) {
    alignas(64) T z[kBlock];
    const int64_t end = request.begin + request.length;
    for (int64_t block = request.begin / kBlock; block * kBlock < end; ++block) {
        fill_block(z, request.key, block);
        const int64_t from = std::max(request.begin, block * kBlock), to = std::min(end, (block + 1) * kBlock);
        std::memcpy(static_cast<T*>(request.out) + (from - request.begin), z + (from - block * kBlock),
                    sizeof(T) * (to - from));
    }
}

void normals(const Normals& request) {
    switch (request.dtype) {
        case DType::float32:
            return write_normals<float>(request);
        case DType::float64:
            return write_normals<double>(request);
    }
}

}  // namespace
}  // namespace LLC_ISA

#define LLC_STRING(x) #x
#define LLC_NAME(x) LLC_STRING(x)
#define LLC_CONCAT(a, b) a##b
#define LLC_BACKEND(isa) LLC_CONCAT(cpu_backend_, isa)
extern const CpuBackend LLC_BACKEND(LLC_ISA);
const CpuBackend LLC_BACKEND(LLC_ISA) = {LLC_NAME(LLC_ISA), step, normals};

}  // namespace llc
