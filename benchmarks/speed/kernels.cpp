// Times copies of step_cpu.cpp in turn, in one process and one thread: see bench_kernels.py, which compiles them, each
// with an LLC_ISA of its own, and defines BACKENDS as X(name) for each.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <ctime>
#include <limits>
#include <vector>

#include "step.h"

namespace llc {
#define X(name) extern const CpuBackend cpu_backend_##name;
BACKENDS
#undef X
}  // namespace llc

using namespace llc;

namespace {

constexpr int64_t kNormals = 4096;

template <class Run>
double nanoseconds(const Run& run) {
    timespec before, after;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &before);
    run();
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &after);
    return double(after.tv_sec - before.tv_sec) * 1e9 + double(after.tv_nsec - before.tv_nsec);
}

}  // namespace

// Arguments: parameters, rounds. A line for each measurement: backend, what, round, ns a normal or parameter.
int main(int, char** arguments) {
    const int64_t n = std::atoll(arguments[1]);
    const int rounds = std::atoi(arguments[2]);
#define X(name) &cpu_backend_##name,
    const std::vector<const CpuBackend*> backends = {BACKENDS};
#undef X
    std::vector<std::vector<float>> arrays(6, std::vector<float>(n, 1e-3f));  // w, two states, gradient, w*, A
    std::vector<float> out(kNormals);
    const Segment segment{0,
                          n,
                          arrays[0].data(),
                          n,
                          arrays[3].data(),
                          n,
                          arrays[4].data(),
                          n,
                          nullptr,
                          {arrays[1].data(), arrays[2].data()},
                          arrays[5].data(),
                          1.0,
                          nullptr};
    const double thermostat = 0.1;
    const char* const names[] = {
#define LLC_NAMED(type, name) name,
        LLC_RULES(LLC_NAMED)
#undef LLC_NAMED
    };
    for (int round = 0; round < rounds; ++round) {
        for (size_t k = 0; k < backends.size(); ++k) {
            const CpuBackend& backend = *backends[(k + size_t(round)) % backends.size()];
            const auto report = [&](const char* what, double time, double count) {
                std::printf("%s %s %d %.4f\n", backend.name, what, round, time / count);
            };
            const auto make = [&] {
                for (int block = 0; block < 50; ++block) {
                    backend.normals(
                        {DType::float32, out.data(), block * kNormals, kNormals, {1, uint64_t(round), 0, 0}});
                }
            };
            make();
            report("normals", nanoseconds(make), 50.0 * kNormals);
            for (size_t rule = 0; rule < std::size(names); ++rule) {
                Step step{};
                step.rule = llc::Rule(rule), step.dtype = DType::float32, step.low = Low::none;
                step.segments = &segment, step.num_segments = 1, step.end = n, step.num_chains = 1;
                step.scalars = {1e-6, 100.0, 1.0, 0.0, 1.0, std::numeric_limits<double>::infinity(),
                                0.99, 0.9,   0.1, 0.1, 1e9, 0.0};
                step.thermostat = &thermostat, step.key.step = uint64_t(round);
                report(names[rule], nanoseconds([&] { backend.step(step, 1); }), double(n));
                step.scalars.noise_level = 0.0;
                std::printf("%s %s-noise-free %d %.4f\n", backend.name, names[rule], round,
                            nanoseconds([&] { backend.step(step, 1); }) / double(n));
            }
        }
    }
}
