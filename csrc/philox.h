// Counter-based noise: (seed, stream, chain, step, element) -> standard normal.
//
// Philox4x32 (Salmon, Moraes, Dror, Shaw: "Parallel random numbers: as easy as 1, 2, 3", SC 2011) turns a
// 128-bit counter into four 32-bit words; Box-Muller turns two words into two normals. Element i of a flat
// parameter vector takes word i % 4 of counter i / 4, so a value depends on nothing but its name: not on the
// number of threads, the split into tensors, or what was drawn before. Nothing is stored.
//
// Every operation below is either exact or correctly rounded on every target (integer arithmetic, fused
// multiply-add, sqrt), which is why CPU and GPU agree to the last bits.
#pragma once

#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define LLC_HD __host__ __device__ __forceinline__
#else
#include <cmath>
#define LLC_HD inline __attribute__((always_inline))
#endif

// Everything that is instantiated per instruction set lives in a namespace of that name: otherwise the linker
// would keep one copy of each inline function, and it might be the one that this machine cannot run.
#ifndef LLC_ISA
#define LLC_ISA common
#endif

namespace llc {

// Seven rounds are the fewest that pass BigCrush (Salmon et al. 2011, table 2; ten are that paper's "safe"
// choice). tests/kernels/test_noise.py tests the normals made from them. Changing this number changes every chain.
constexpr int kPhiloxRounds = 7;
constexpr uint32_t kPhiloxM0 = 0xD2511F53u, kPhiloxM1 = 0xCD9E8D57u;
constexpr uint32_t kPhiloxW0 = 0x9E3779B9u, kPhiloxW1 = 0xBB67AE85u;

// What is drawn, apart from the element: one of these per (run, chain, step).
struct NoiseKey {
    uint64_t seed;
    uint64_t step;  // 40 bits are used
    uint32_t chain;
    uint32_t stream;  // 8 bits: separates kinds of draws (0: Langevin noise)
};

inline namespace LLC_ISA {

// a * b + c, rounded once where the target can.
LLC_HD float fused(float a, float b, float c) {
#if defined(__CUDA_ARCH__) || defined(__FMA__) || defined(__aarch64__)
    return __builtin_fmaf(a, b, c);
#else
    return a * b + c;
#endif
}
LLC_HD double fused(double a, double b, double c) {
#if defined(__CUDA_ARCH__) || defined(__FMA__) || defined(__aarch64__)
    return __builtin_fma(a, b, c);
#else
    return a * b + c;
#endif
}

template <class To, class From>
LLC_HD To bit_cast(From from) {
    static_assert(sizeof(To) == sizeof(From), "bit_cast between different sizes");
    To to;
    memcpy(&to, &from, sizeof(to));
    return to;
}

template <class Words>
struct WideProduct {
    Words high, low;
};

struct ScalarMultiply {
    LLC_HD WideProduct<uint32_t> operator()(uint32_t word, uint32_t m) const {
#ifdef __CUDA_ARCH__
        return {__umulhi(word, m), word * m};  // one IMAD.WIDE
#else
        const uint64_t product = word * uint64_t{m};
        return {uint32_t(product >> 32), uint32_t(product)};
#endif
    }
};

// Philox on one counter, or on as many as `Words` has of each word; multiply(words, m) is the WideProduct of each with
// m.
template <class Words, class Multiply>
LLC_HD void philox(Words& c0, Words& c1, Words& c2, Words& c3, uint64_t seed, Multiply multiply) {
    uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
#ifdef __CUDACC__
#pragma unroll
#else
#pragma GCC unroll 10
#endif
    for (int round = 0; round < kPhiloxRounds; ++round) {
        const auto p0 = multiply(c0, kPhiloxM0), p1 = multiply(c2, kPhiloxM1);
        c0 = p1.high ^ c1 ^ k0;
        c2 = p0.high ^ c3 ^ k1;
        c1 = p1.low;
        c3 = p0.low;
        k0 += kPhiloxW0;
        k1 += kPhiloxW1;
    }
}

// The counter's other three words; the first is the low half of `counter` itself.
LLC_HD uint32_t counter_word1(const NoiseKey& key) {
    return uint32_t(key.step);
}
LLC_HD uint32_t counter_word2(const NoiseKey& key) {
    return key.chain;
}
LLC_HD uint32_t counter_word3(const NoiseKey& key, uint64_t counter) {
    return uint32_t((counter >> 32) & 0xFFFFu) | uint32_t((key.step >> 32) & 0xFFu) << 16 | key.stream << 24;
}

// u = (x | 1) / 2^32, the midpoints of 2^31 equal cells: never 0, never 1. Written as 2^-shift (1 + fraction / 2^32),
// with the nearest power of two, rounding up from sqrt(1/2). All in integers. For the smallest u, where the shift is
// 32, the fraction is 1 instead of 0: a vector's variable shifts need no comparison then, and a float's logarithm is
// the same.
LLC_HD void split_uniform(uint32_t x, int32_t& shift, int32_t& fraction) {
    const float half = static_cast<float>(static_cast<int32_t>(x >> 1)) + 0.5f;  // u 2^31
    // -log2(u), rounded, by one subtraction from the bits; 0x3F3504F3 is sqrt(1/2).
    constexpr uint32_t kFrom = ((127u + 32u) << 23) - 1 - (0x3F800000u - 0x3F3504F3u);
    shift = static_cast<int32_t>((kFrom - bit_cast<uint32_t>(half)) >> 23);
    // Modulo 2^32, that is without the power of two.
#if defined(__SSE2__) && !defined(__AVX2__) && !defined(__CUDA_ARCH__)
    // No shifts by different amounts in these vectors. Not 2^31: 2 is the nearest power of two to no odd number.
    const float power = bit_cast<float>(static_cast<uint32_t>((shift & 31) + 127) << 23);
    fraction = static_cast<int32_t>((x | 1u) * static_cast<uint32_t>(static_cast<int32_t>(power)));
#else
    fraction = static_cast<int32_t>((x | 1u) << (shift & 31));
#endif
}

// -2 log(u) = 2 shift log 2 - 2 log(1 + r), r exact but for its rounding to T: the result has full relative precision
// at both ends, and so do the largest normals (6.66 sigma) and the smallest.
LLC_HD float minus_two_log_uniform(uint32_t x, float) {
    int32_t shift, fraction;
    split_uniform(x, shift, fraction);
    const float scaled = static_cast<float>(fraction), r = scaled * 0x1p-32f;
    // log(1+r) = r - r^2/2 + r^3 p(r) on [sqrt(1/2)-1, sqrt(2)-1]: minimax, relative error 3.4e-8. All times -2.
    float p = -2 * 0.08917879722f;
    p = fused(p, r, -2 * -0.1435020306f);
    p = fused(p, r, -2 * 0.1487695865f);
    p = fused(p, r, -2 * -0.1656563432f);
    p = fused(p, r, -2 * 0.1996539830f);
    p = fused(p, r, -2 * -0.2500174694f);
    p = fused(p, r, -2 * 0.3333385806f);
    const float log1p = fused(p * r, r * r, fused(r, r, scaled * -0x1p-31f));
    return fused(static_cast<float>(shift), 2 * 0.693147180559945f, log1p);
}

LLC_HD double minus_two_log_uniform(uint32_t x, double) {
    int32_t shift, fraction;
    split_uniform(x, shift, fraction);
    const double r = static_cast<double>(fraction - (shift >> 5)) * 0x1p-32;  // 0 for the smallest u
    // log(1+r) = 2 atanh(s), s = r / (2+r), |s| < 0.172: its Taylor series, first term left out below 2e-17.
    const double s = r / (2.0 + r), z = s * s;
    double p = 1.0 / 21;
    p = fused(p, z, 1.0 / 19);
    p = fused(p, z, 1.0 / 17);
    p = fused(p, z, 1.0 / 15);
    p = fused(p, z, 1.0 / 13);
    p = fused(p, z, 1.0 / 11);
    p = fused(p, z, 1.0 / 9);
    p = fused(p, z, 1.0 / 7);
    p = fused(p, z, 1.0 / 5);
    p = fused(p, z, 1.0 / 3);
    return fused(static_cast<double>(shift), 2 * 0.693147180559945309417, -4.0 * fused(s * z, p, s));
}

// A uniform point on the unit circle: the low 31 bits of x are an angle in [-pi/2, pi/2), the top bit the
// sign of the cosine. No range reduction, no branch, no swap.
LLC_HD void circle_point(uint32_t x, float& cosine, float& sine) {
    const float t = static_cast<float>(static_cast<int32_t>(x << 1)) * float(1.57079632679489661923 / 2147483648.0);
    const float z = t * t;
    float s = 2.608932681e-6f;  // sin t = t + t z s(z), minimax, error 5e-9
    s = fused(s, z, -1.981111276e-4f);
    s = fused(s, z, 8.333088167e-3f);
    s = fused(s, z, -0.1666666046f);
    sine = fused(s * z, t, t);
    float c = -2.619381522e-7f;  // cos t = 1 - z/2 + z^2 c(z), minimax, error 4e-10
    c = fused(c, z, 2.476930424e-5f);
    c = fused(c, z, -1.388856916e-3f);
    c = fused(c, z, 4.166665577e-2f);
    c = fused(c * z, z, fused(-0.5f, z, 1.0f));
    cosine = bit_cast<float>(bit_cast<uint32_t>(c) ^ (x & 0x80000000u));
}

LLC_HD void circle_point(uint32_t x, double& cosine, double& sine) {
    const double t = static_cast<double>(static_cast<int32_t>(x << 1)) * (1.57079632679489661923 / 2147483648.0);
    const double z = t * t;
    // Taylor series, first terms left out below 2e-18 (sin) and 2e-19 (cos).
    double s = 1.0 / 51090942171709440000.0;
    s = fused(s, z, -1.0 / 121645100408832000.0);
    s = fused(s, z, 1.0 / 355687428096000.0);
    s = fused(s, z, -1.0 / 1307674368000.0);
    s = fused(s, z, 1.0 / 6227020800.0);
    s = fused(s, z, -1.0 / 39916800.0);
    s = fused(s, z, 1.0 / 362880.0);
    s = fused(s, z, -1.0 / 5040.0);
    s = fused(s, z, 1.0 / 120.0);
    s = fused(s, z, -1.0 / 6.0);
    sine = fused(s * z, t, t);
    double c = -1.0 / 1124000727777607680000.0;
    c = fused(c, z, 1.0 / 2432902008176640000.0);
    c = fused(c, z, -1.0 / 6402373705728000.0);
    c = fused(c, z, 1.0 / 20922789888000.0);
    c = fused(c, z, -1.0 / 87178291200.0);
    c = fused(c, z, 1.0 / 479001600.0);
    c = fused(c, z, -1.0 / 3628800.0);
    c = fused(c, z, 1.0 / 40320.0);
    c = fused(c, z, -1.0 / 720.0);
    c = fused(c, z, 1.0 / 24.0);
    c = fused(c * z, z, fused(-0.5, z, 1.0));
    cosine = (x & 0x80000000u) ? -c : c;
}

// Two words -> two independent standard normals.
template <class T>
LLC_HD void box_muller(uint32_t radius_word, uint32_t angle_word, T& first, T& second) {
    const T square = minus_two_log_uniform(radius_word, T{});
#ifdef __CUDACC__
    const T radius = sqrt(square);
#else
    const T radius = std::sqrt(square);
#endif
    T cosine, sine;
    circle_point(angle_word, cosine, sine);
    first = radius * cosine;
    second = radius * sine;
}

// The normals of elements 4*counter … 4*counter + 3.
template <class T>
LLC_HD void normals4(const NoiseKey& key, uint64_t counter, T (&z)[4]) {
    uint32_t c0 = uint32_t(counter), c1 = counter_word1(key), c2 = counter_word2(key), c3 = counter_word3(key, counter);
    philox(c0, c1, c2, c3, key.seed, ScalarMultiply{});
    box_muller(c0, c1, z[0], z[1]);
    box_muller(c2, c3, z[2], z[3]);
}

}  // namespace LLC_ISA
}  // namespace llc
