// The SIMD loop over segments and chains. Compiled once per instruction set, with LLC_ISA naming it.
#include <algorithm>
#include <cstring>
#include <utility>

#include "step.h"

#if defined(__SSE2__)
// GCC 12 warns of its own header's way to say "undefined".
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop
#elif defined(__aarch64__)
#include <arm_neon.h>
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
constexpr int kWords = kVectorBytes / 4;
using Words = uint32_t __attribute__((vector_size(kVectorBytes)));
using Floats = float __attribute__((vector_size(kVectorBytes)));

// In each 128 bits of the result: four of the numbers that a (0 … 3) and b (4 … 7) have in these 128 bits.
template <int... picked, int... i>
LLC_HD Floats pick(Floats a, Floats b, std::integer_sequence<int, i...>) {
    constexpr int from[] = {picked...};
#if defined(__clang__) || __GNUC__ >= 12
    return __builtin_shufflevector(a, b, (i / 4 * 4 + from[i % 4] % 4 + from[i % 4] / 4 * kWords)...);
#else
    using Places = int32_t __attribute__((vector_size(kVectorBytes)));
    return __builtin_shuffle(a, b, Places{(i / 4 * 4 + from[i % 4] % 4 + from[i % 4] / 4 * kWords)...});
#endif
}
template <int... picked>
LLC_HD Floats pick(Floats a, Floats b) {
    return pick<picked...>(a, b, std::make_integer_sequence<int, kWords>{});
}

// `Counters` has one word of kWords counters for philox().
#if defined(__SSE2__)
// In the low halves of 64-bit lanes, whatever is above them: the widening product, which compilers do not find by
// themselves, leaves its low word in place, so that a round takes a shift for each product, and no mask.
using Lanes = uint64_t __attribute__((vector_size(kVectorBytes)));
struct Counters {
    Lanes a, b;
    LLC_HD Counters operator^(const Counters& other) const { return {a ^ other.a, b ^ other.b}; }
    LLC_HD Counters operator^(uint32_t word) const { return {a ^ word, b ^ word}; }
};

LLC_HD Words words(const Counters& c) {
    return reinterpret_cast<Words>(pick<0, 2, 4, 6>(reinterpret_cast<Floats>(c.a), reinterpret_cast<Floats>(c.b)));
}
// words() will be `word` plus order(0), order(1) …
template <class Order>
LLC_HD Counters make_counters(uint32_t word, Order order) {
    Lanes a{}, b{};
    for (int i = 0; i < kWords / 2; ++i) a[i] = order(i / 2 * 4 + i % 2), b[i] = order(i / 2 * 4 + i % 2 + 2);
    return {a + word, b + word};
}

LLC_HD Lanes multiply(Lanes lanes, uint32_t m) {
#if defined(__AVX512F__)
    return reinterpret_cast<Lanes>(_mm512_mul_epu32(reinterpret_cast<__m512i>(lanes), _mm512_set1_epi64(m)));
#elif defined(__AVX2__)
    return reinterpret_cast<Lanes>(_mm256_mul_epu32(reinterpret_cast<__m256i>(lanes), _mm256_set1_epi64x(m)));
#else
    return reinterpret_cast<Lanes>(_mm_mul_epu32(reinterpret_cast<__m128i>(lanes), _mm_set1_epi64x(m)));
#endif
}
struct VectorMultiply {
    LLC_HD WideProduct<Counters> operator()(const Counters& c, uint32_t m) const {
        const Lanes a = multiply(c.a, m), b = multiply(c.b, m);
        return {{a >> 32, b >> 32}, {a, b}};
    }
};
#else
using Counters = Words;

LLC_HD Words words(Counters c) {
    return c;
}
template <class Order>
LLC_HD Counters make_counters(uint32_t word, Order order) {
    Words c{};
    for (int i = 0; i < kWords; ++i) c[i] = order(i);
    return c + word;
}
struct VectorMultiply {
    LLC_HD WideProduct<Words> operator()(Words words, uint32_t m) const {
#if defined(__aarch64__)
        const uint32x4_t c = reinterpret_cast<uint32x4_t>(words);
        const uint32x4_t low = vreinterpretq_u32_u64(vmull_n_u32(vget_low_u32(c), m));
        const uint32x4_t high = vreinterpretq_u32_u64(vmull_high_n_u32(c, m));
        return {reinterpret_cast<Words>(vuzp2q_u32(low, high)), reinterpret_cast<Words>(vuzp1q_u32(low, high))};
#else
        using Wide = uint64_t __attribute__((vector_size(2 * kVectorBytes)));
        const Wide product = __builtin_convertvector(words, Wide) * m;
        return {__builtin_convertvector(product >> 32, Words), __builtin_convertvector(product, Words)};
#endif
    }
};
#endif

// The loop works on blocks of the flat parameter vector: a block's noise is made in the first-level cache,
// then used by every segment that reaches into the block. 512 floats are 2 KiB: large enough to amortize the
// calls, small enough that the arithmetic of one block overlaps with the memory traffic of the next.
constexpr int64_t kBlock = 512;

// Memory that will be needed when a block's noise is there. It is fetched line by line while that is made: left to
// themselves, processors begin when the update asks for it, and the memory has nothing to do before.
struct Upcoming {
    int64_t bytes = 0;     // of each
    int count = 0;         // of arrays
    const char* first[6];  // w, two states, gradient, w*, preconditioner

    void add(const void* base, int64_t offset) { first[count++] = static_cast<const char*>(base) + offset; }
    LLC_HD void fetch(int64_t begin, int64_t end) const {
        for (int64_t at = begin; at < std::min(end, bytes); at += 64) {
            for (int k = 0; k < count; ++k) __builtin_prefetch(first[k] + at);
        }
    }
};

// Four numbers side by side, x[0][i] … x[3][i], for i = 0, 4, 8, …, 1, 5, 9, … in this order.
LLC_HD void store_transposed(const float (&x)[4][kWords], float* out) {
    const Floats &x0 = reinterpret_cast<const Floats&>(x[0]), &x1 = reinterpret_cast<const Floats&>(x[1]);
    const Floats &x2 = reinterpret_cast<const Floats&>(x[2]), &x3 = reinterpret_cast<const Floats&>(x[3]);
    const Floats a = pick<0, 4, 1, 5>(x0, x1), b = pick<0, 4, 1, 5>(x2, x3);
    const Floats c = pick<2, 6, 3, 7>(x0, x1), d = pick<2, 6, 3, 7>(x2, x3);
    Floats* const rows = reinterpret_cast<Floats*>(out);
    rows[0] = pick<0, 1, 4, 5>(a, b), rows[1] = pick<2, 3, 6, 7>(a, b);
    rows[2] = pick<0, 1, 4, 5>(c, d), rows[3] = pick<2, 3, 6, 7>(c, d);
}

// As much of a block as is made at a time, two vectors of each word: in larger chunks more lines would be fetched at
// once than processors keep track of.
constexpr int64_t kChunk = 8 * kWords;

// The normals of elements [block * kBlock, (block + 1) * kBlock). In two loops: processors do not look ahead as far as
// the chain of dependent instructions in one loop is long.
template <class T>
void fill_block(T* z, const NoiseKey& key, int64_t block, const Upcoming& upcoming) {
    constexpr int64_t kCounters = kChunk / 4;
    // Counters lie in vectors in the order that store_transposed wants, if it is used.
    constexpr bool kTransposed = sizeof(T) == sizeof(float);
    const auto order = [](int i) { return uint32_t(kTransposed ? i % 4 * (kWords / 4) + i / 4 : i); };
    const auto all = [](uint32_t word) { return make_counters(word, [](int) { return 0u; }); };
    const Counters word1 = all(counter_word1(key)), word2 = all(counter_word2(key));
    // A block never straddles a multiple of 2^32.
    const Counters word3 = all(counter_word3(key, uint64_t(block) * (kBlock / 4)));

    alignas(64) uint32_t random[4][kCounters];
    for (int64_t begin = 0; begin < kBlock; begin += kChunk) {
        upcoming.fetch(begin * sizeof(T), (begin + kChunk) * sizeof(T));
        const uint32_t first = uint32_t((block * kBlock + begin) / 4);
        for (int k = 0; k < kCounters; k += kWords) {
            Counters c0 = make_counters(first + k, order), c1 = word1, c2 = word2, c3 = word3;
            philox(c0, c1, c2, c3, key.seed, VectorMultiply{});
            reinterpret_cast<Words&>(random[0][k]) = words(c0);
            reinterpret_cast<Words&>(random[1][k]) = words(c1);
            reinterpret_cast<Words&>(random[2][k]) = words(c2);
            reinterpret_cast<Words&>(random[3][k]) = words(c3);
        }
        for (int k = 0; k < kCounters; k += kWords) {
            T* const out = z + begin + 4 * k;
            if constexpr (kTransposed) {
                alignas(64) float x[4][kWords];
#pragma omp simd
                for (int i = 0; i < kWords; ++i) {
                    box_muller(random[0][k + i], random[1][k + i], x[0][i], x[1][i]);
                    box_muller(random[2][k + i], random[3][k + i], x[2][i], x[3][i]);
                }
                store_transposed(x, out);
            } else {
#pragma omp simd
                for (int i = 0; i < kWords; ++i) {
                    box_muller(random[0][k + i], random[1][k + i], out[4 * i], out[4 * i + 1]);
                    box_muller(random[2][k + i], random[3][k + i], out[4 * i + 2], out[4 * i + 3]);
                }
            }
        }
    }
}

// The operands of one segment inside one block, for one chain. `reference` may be `w`.
template <class T>
struct Operands {
    T* w;
    T* state[2];
    const T *grad, *reference, *noise, *preconditioner;
    T thermostat;
    int64_t n;
};

template <class Rule, class T>
LLC_HD Coordinate<T> load(const Operands<T>& o, int64_t i) {
    Coordinate<T> x;
    x.grad = o.grad[i], x.reference = o.reference[i], x.noise = o.noise[i], x.w = o.w[i];
    x.preconditioner = Rule::kPreconditioned ? o.preconditioner[i] : T(1);
    x.thermostat = o.thermostat;
    if constexpr (Rule::kStates > 0) x.state[0] = o.state[0][i];
    if constexpr (Rule::kStates > 1) x.state[1] = o.state[1][i];
    return x;
}

template <class Rule, class T>
LLC_HD void store(const Operands<T>& o, int64_t i, const Coordinate<T>& x) {
    o.w[i] = x.w;
    if constexpr (Rule::kStates > 0) o.state[0][i] = x.state[0];
    if constexpr (Rule::kStates > 1) o.state[1][i] = x.state[1];
}

// Iterations are independent (where `reference` is `w`, each reads its own). Not `omp simd` here: GCC 12 would keep an
// array of Coordinates for it, and then not vectorize the rules that have state.
#if defined(__clang__)
#define LLC_INDEPENDENT _Pragma("clang loop vectorize(assume_safety)")
#else
#define LLC_INDEPENDENT _Pragma("GCC ivdep")
#endif

constexpr int kWide = 16;

// How `measure` adds to one lane of the sums: `counted` is 0 for an element that its mask holds, else 1.
template <class T>
struct AddToLane {
    T (&sums)[kNumSums][kWide];
    int lane;
    T counted;
    LLC_HD void operator()(Sum sum, T a, T b) const { sums[sum][lane] += counted * a * b; }
};

// Updates all elements, and adds to `totals` what those with a nonzero mask contribute to the sums in kSums. Terms are
// added lane by lane, at most a block in T, then on in double: the order is fixed, and compilers vectorize the inner
// loop without being asked to reorder.
template <SumSet kSums, bool kMasked, class Rule, class T>
void update(const Rule& rule, const Operands<T>& o, const uint8_t* mask, double* totals) {
    alignas(64) T sums[kNumSums][kWide] = {};
    const auto one = [&](int64_t i, int lane) __attribute__((always_inline)) {
        Coordinate<T> x = load<Rule>(o, i);
        const T before = x.w;
        rule(x);
        store<Rule>(o, i, x);
        measure<kSums, Rule>(x, before, AddToLane<T>{sums, lane, kMasked ? T(mask[i] != 0) : T(1)});
    };
    const int64_t whole = o.n / kWide * kWide;
    for (int64_t i = 0; i < whole; i += kWide) {
        LLC_INDEPENDENT
        for (int lane = 0; lane < kWide; ++lane) one(i + lane, lane);
    }
    for (int64_t i = whole; i < o.n; ++i) one(i, int(i - whole));
    for (int sum = 0; sum < kNumSums; ++sum) {
        if (!holds(kSums, sum)) continue;
        for (int width = kWide / 2; width > 0; width /= 2) {
            for (int lane = 0; lane < width; ++lane) sums[sum][lane] += sums[sum][lane + width];
        }
        totals[sum] += double(sums[sum][0]);
    }
}

// What is not laid out as the loops want it is put into these first: a block of each fits the first-level cache.
template <class T>
struct Staging {
    alignas(64) T noise[kBlock] = {};
    alignas(64) T grad[kBlock];
    alignas(64) T reference[kBlock];
    alignas(64) T preconditioner[kBlock];
    alignas(64) T before[kBlock];
};

// The part of `segment` inside `block`, in chain `chain`; staging.noise is the block's.
template <SumSet kSums, class Rule, class T>
void update_segment(const Rule& rule, const Step& step, const Segment& segment, int64_t chain, int64_t block,
                    Staging<T>& staging, double* totals) {
    const int64_t begin = std::max(segment.offset, block * kBlock);
    const int64_t end = std::min(segment.offset + segment.length, (block + 1) * kBlock);
    const int64_t n = end - begin, local = begin - segment.offset, row = chain * segment.stride + local;
    Operands<T> o;
    o.n = n;
    o.w = static_cast<T*>(segment.w) + row;
    for (int k = 0; k < 2; ++k) o.state[k] = k < Rule::kStates ? static_cast<T*>(segment.state[k]) + row : nullptr;
    const int64_t reference_row = chain * segment.reference_stride + local;
    if (!step.low_reference) {
        o.reference = static_cast<const T*>(segment.reference) + reference_row;
    } else {
        const uint16_t* low = static_cast<const uint16_t*>(segment.reference) + reference_row;
        for (int64_t i = 0; i < n; ++i) staging.reference[i] = T(from_low(low[i], step.low));
        o.reference = staging.reference;
    }
    o.noise = staging.noise + (begin - block * kBlock);
    o.thermostat = step.thermostat ? T(step.thermostat[chain]) : T(0);
    const int64_t grad_row = chain * segment.grad_stride + local;
    if (step.low == Low::none) {
        o.grad = static_cast<const T*>(segment.grad) + grad_row;
    } else {
        const uint16_t* low = static_cast<const uint16_t*>(segment.grad) + grad_row;
        for (int64_t i = 0; i < n; ++i) staging.grad[i] = T(from_low(low[i], step.low));
        o.grad = staging.grad;
    }
    if constexpr (Rule::kPreconditioned) {
        const T scale = T(segment.preconditioner_scale);
        const T* given = static_cast<const T*>(segment.preconditioner);
        for (int64_t i = 0; i < n; ++i) staging.preconditioner[i] = given ? scale * given[local + i] : scale;
        o.preconditioner = staging.preconditioner;
    }
    const uint8_t* mask = segment.mask ? segment.mask + local : nullptr;
    if (mask) std::memcpy(staging.before, o.w, sizeof(T) * n);

    if (kSums != 0 && mask) {
        update<kSums, true>(rule, o, mask, totals);
    } else {
        update<kSums, false>(rule, o, mask, totals);
    }
    if (mask) {
        for (int64_t i = 0; i < n; ++i) o.w[i] = mask[i] ? o.w[i] : staging.before[i];
    }
    if (segment.copy) {
        uint16_t* copy = static_cast<uint16_t*>(segment.copy) + row;
        for (int64_t i = 0; i < n; ++i) copy[i] = to_low(float(o.w[i]), step.low);
    }
}

// What the update will read of a segment's part inside `block`, but for its mask.
template <class Rule, class T>
Upcoming upcoming(const Step& step, const Segment& segment, int64_t chain, int64_t block) {
    const int64_t begin = std::max(segment.offset, block * kBlock);
    const int64_t n = std::min(segment.offset + segment.length, (block + 1) * kBlock) - begin;
    const int64_t local = begin - segment.offset, row = chain * segment.stride + local;
    // Of numbers with half the bits it is twice as much as needed: the next block's.
    const int64_t full = sizeof(T), low = sizeof(uint16_t);
    Upcoming reads;
    reads.bytes = n * full;
    reads.add(segment.w, row * full);
    for (int k = 0; k < Rule::kStates; ++k) reads.add(segment.state[k], row * full);
    reads.add(segment.grad, (chain * segment.grad_stride + local) * (step.low == Low::none ? full : low));
    reads.add(segment.reference, (chain * segment.reference_stride + local) * (step.low_reference ? low : full));
    if (Rule::kPreconditioned && segment.preconditioner) reads.add(segment.preconditioner, local * full);
    return reads;
}

// Blocks [first, last) of all chains. Chains are innermost: their common w* is then read from memory once.
// Adds to the sums in kSums of `totals`, [chain][kNumSums].
template <SumSet kSums, class Rule, class T>
void run_blocks(const Step& step, int64_t first, int64_t last, double* totals) {
    const Rule rule(step.scalars, step.key.step);
    const bool noisy = step.scalars.noise_level != 0;
    Staging<T> staging;
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
            if (noisy) fill_block(staging.noise, key, block, upcoming<Rule, T>(step, *segment, chain, block));
            double* const of_chain = kSums ? totals + chain * kNumSums : nullptr;
            for (auto s = segment; s != stop && s->offset < (block + 1) * kBlock; ++s) {
                update_segment<kSums>(rule, step, *s, chain, block, staging, of_chain);
            }
        }
    }
}

// Sums are taken over parts of this many blocks, then over the parts in order: the parts do not depend on the number of
// threads, so neither do the bits of the sums.
constexpr int64_t kPart = 64;

template <SumSet kSums, class Rule, class T>
void run(const Step& step, int num_threads) {
    const int64_t first = step.begin / kBlock, last = (step.end + kBlock - 1) / kBlock, blocks = last - first;
    // A thread that has less than this to do costs more than it saves.
    constexpr int64_t kBlocksPerThread = 32;
    const int threads = int(std::clamp<int64_t>(blocks * step.num_chains / kBlocksPerThread, 1, num_threads));
    const int64_t parts = kSums ? (blocks + kPart - 1) / kPart : threads;
    const int64_t per_part = kSums ? step.num_chains * kNumSums : 0;
    // Not a std::vector: the linker would keep one copy of its functions for all instruction sets, see philox.h.
    double* const totals = kSums ? new double[size_t(parts * per_part)]() : nullptr;
    const auto run_part = [&](int64_t part) {
        const int64_t from = first + (kSums ? part * kPart : blocks * part / parts);
        const int64_t to = kSums ? std::min(last, from + kPart) : first + blocks * (part + 1) / parts;
        run_blocks<kSums, Rule, T>(step, from, to, totals + part * per_part);
    };
    if (threads == 1) {  // not even an empty parallel region: small steps must stay cheap
        for (int64_t part = 0; part < parts; ++part) run_part(part);
    } else {
#pragma omp parallel for num_threads(threads) schedule(static)
        for (int64_t part = 0; part < parts; ++part) run_part(part);
    }
    for (int64_t k = 0; k < per_part; ++k) {
        step.sums[k] = 0;
        if (!holds(step.wanted, int(k % kNumSums))) continue;
        for (int64_t part = 0; part < parts; ++part) step.sums[k] += totals[part * per_part + k];
    }
    delete[] totals;
}

template <class Rule, class T>
void run_with(const Step& step, int num_threads) {
    with_sums<Rule>(step.wanted, [&](auto sums) { run<decltype(sums)::value, Rule, T>(step, num_threads); });
}

template <template <class> class Rule>
void run_as(const Step& step, int num_threads) {
    switch (step.dtype) {
        case DType::float32:
            return run_with<Rule<float>, float>(step, num_threads);
        case DType::float64:
            return run_with<Rule<double>, double>(step, num_threads);
    }
}

void step(const Step& s, int num_threads) {
    switch (s.rule) {
#define LLC_CASE(type, name) \
    case llc::Rule::type:    \
        return run_as<type>(s, num_threads);
        LLC_RULES(LLC_CASE)
#undef LLC_CASE
    }
}

template <class T>
void write_normals(const Normals& request) {
    if (request.length == 0) return;  // `out` may be null then
    alignas(64) T z[kBlock];
    const int64_t end = request.begin + request.length;
    for (int64_t block = request.begin / kBlock; block * kBlock < end; ++block) {
        fill_block(z, request.key, block, Upcoming{});
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

// Numbers of 32 bits, in vectors twice as wide as those of 64.
template <class Index>
void permute(const Permutation& order, Index* x, int64_t count) {
    const Permutation own = order;  // whose keys no store to x can change
    LLC_INDEPENDENT
    for (int64_t k = 0; k < count; ++k) x[k] = own.once(x[k]);
}

// `walk` for many at a time: those that are beyond n are put side by side, so that vectors hold nothing else.
template <class Index>
void write_order(const Permutation& order, uint64_t first, int64_t* out, int64_t count) {
    Index x[kBlock];
    int32_t places[kBlock];
    const Index n = Index(order.num_samples);
    for (int64_t k = 0; k < count; ++k) x[k] = Index(first + uint64_t(k)), places[k] = int32_t(k);
    while (count > 0) {
        permute(order, x, count);
        int64_t beyond = 0;
        for (int64_t k = 0; k < count; ++k) {
            const Index value = x[k];
            const int32_t place = places[k];
            out[place] = int64_t(value);
            x[beyond] = value, places[beyond] = place;
            beyond += value >= n;
        }
        count = beyond;
    }
}

void minibatch(const Minibatch& batch) {
    for (int64_t chain = 0; chain < batch.num_chains; ++chain) {
        int64_t* out = batch.out + chain * batch.batch_size;
        uint64_t first;
        const Permutation order = minibatch_order(batch, batch.key.step, chain, first);
        const bool is_narrow = uint64_t(batch.num_samples) <= uint64_t{1} << 31;
        for (int64_t k = 0; k < batch.batch_size; k += kBlock) {
            const int64_t count = std::min(kBlock, batch.batch_size - k);
            if (is_narrow) {
                write_order<uint32_t>(order, first + uint64_t(k), out + k, count);
            } else {
                write_order<uint64_t>(order, first + uint64_t(k), out + k, count);
            }
        }
    }
}

}  // namespace
}  // namespace LLC_ISA

#define LLC_STRING(x) #x
#define LLC_NAME(x) LLC_STRING(x)
#define LLC_CONCAT(a, b) a##b
#define LLC_BACKEND(isa) LLC_CONCAT(cpu_backend_, isa)
extern const CpuBackend LLC_BACKEND(LLC_ISA);
const CpuBackend LLC_BACKEND(LLC_ISA) = {LLC_NAME(LLC_ISA), step, normals, minibatch};

}  // namespace llc
