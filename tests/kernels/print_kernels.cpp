// Writes what the kernels of one instruction set (LLC_ISA) make: normals, and steps of every rule. test_arm64.py
// compares.
#include <cstdio>
#include <vector>

#include "step.h"

#define LLC_CONCAT(a, b) a##b
#define LLC_BACKEND(isa) LLC_CONCAT(cpu_backend_, isa)

namespace llc {
extern const CpuBackend LLC_BACKEND(LLC_ISA);

namespace {

const CpuBackend& backend = LLC_BACKEND(LLC_ISA);
constexpr int64_t kElements = 1500, kChains = 2;

template <class T>
void write(const std::vector<T>& values) {
    std::fwrite(values.data(), sizeof(T), values.size(), stdout);
}

// The second begins in a block where the counter's upper half changes.
template <class T>
void write_normals(DType dtype) {
    const NoiseKey key{0x123456789ABCDEF0u, (uint64_t{1} << 33) + 5, 7, 0};
    for (const int64_t begin : {int64_t{3}, (int64_t{1} << 34) - 700}) {
        std::vector<T> out(100'000);
        backend.normals({dtype, out.data(), begin, int64_t(out.size()), key});
        write(out);
    }
}

template <class T>
void write_steps(llc::Rule rule, DType dtype) {
    std::vector<T> given[6];  // w, two states, gradients, w*, preconditioner
    for (int k = 0; k < 6; ++k) {
        given[k].resize(kElements * kChains);
        backend.normals({dtype, given[k].data(), 0, kElements * kChains, {1, uint64_t(k), 0, 1}});
        for (T& x : given[k]) x = k == 5 || k == 1 ? x * x + T(0.5) : x;
    }
    const Segment segment{100,
                          kElements,
                          given[0].data(),
                          kElements,
                          given[3].data(),
                          kElements,
                          given[4].data(),
                          0,
                          nullptr,
                          {given[1].data(), given[2].data()},
                          given[5].data(),
                          2.0,
                          nullptr};
    const double thermostat[kChains] = {0.1, 0.2};
    std::vector<double> sums(kChains * kNumSums);
    Step step{};
    step.rule = rule, step.dtype = dtype, step.segments = &segment, step.num_segments = 1;
    step.begin = 100, step.end = 100 + kElements, step.num_chains = kChains;
    step.scalars = {0.25, 2.0, 1.5, 0.125, 1.0, 2.0, 0.75, 0.5, 0.125, 0.25, 100.0, 0.0};
    step.thermostat = thermostat, step.wanted = kAllSums, step.sums = sums.data();
    for (step.key = {5, 0, 0, 0}; step.key.step < 3; ++step.key.step) {
        backend.step(step, 1);
        write(sums);
    }
    for (int k = 0; k < 3; ++k) write(given[k]);
}

}  // namespace
}  // namespace llc

int main() {
    llc::write_normals<float>(llc::DType::float32);
    llc::write_normals<double>(llc::DType::float64);
#define LLC_CASE(type, name)                                       \
    llc::write_steps<float>(llc::Rule::type, llc::DType::float32); \
    llc::write_steps<double>(llc::Rule::type, llc::DType::float64);
    LLC_RULES(LLC_CASE)
#undef LLC_CASE
}
