// Fused multiply-adds that wait for nothing but each other: what the machine could do at most.
//
//     c++ -O3 -mavx512f -shared -fPIC peak.cpp -o peak.so
#include <ctime>

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#else
constexpr int kLanes = 8;
#endif
using Vector = float __attribute__((vector_size(4 * kLanes)));

// GFLOP/s of this thread's processor time.
extern "C" double peak(long rounds) {
    constexpr int kSums = 12;  // two begin in a clock, and each takes four or five
    volatile float factor = 0.999f, term = 0.001f;
    const Vector x = Vector{} + factor, y = Vector{} + term;
    Vector sums[kSums];
    for (int i = 0; i < kSums; ++i) sums[i] = Vector{} + float(i);
    timespec begin, end;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &begin);
    for (long k = 0; k < rounds; ++k) {
#pragma GCC unroll 12
        for (int i = 0; i < kSums; ++i) sums[i] = sums[i] * x + y;
    }
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &end);
    Vector total{};
    for (const Vector& sum : sums) total += sum;
    volatile float kept = total[0];
    (void)kept;
    const double ns = 1e9 * double(end.tv_sec - begin.tv_sec) + double(end.tv_nsec - begin.tv_nsec);
    return 2.0 * kSums * kLanes * double(rounds) / ns;
}
