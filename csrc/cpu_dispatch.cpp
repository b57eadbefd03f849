// Chooses among the copies of step_cpu.cpp and products_cpu.cpp once, when first asked. Must itself run anywhere.
#include <cstdlib>
#include <stdexcept>
#include <string>

#include "products.h"
#include "step.h"

namespace llc {

extern const CpuBackend cpu_backend_baseline;
#ifdef LLC_X86_ISAS
extern const CpuBackend cpu_backend_avx2, cpu_backend_avx512;
extern const Multiply multiply_avx2, multiply_avx512;
#endif

namespace {

struct Candidate {
    const CpuBackend* backend;
    bool runs_here;
};

const CpuBackend& choose() {
#ifdef LLC_X86_ISAS
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
                        __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
    const Candidate candidates[] = {
        {&cpu_backend_avx512, avx512}, {&cpu_backend_avx2, avx2}, {&cpu_backend_baseline, true}};
#else
    const Candidate candidates[] = {{&cpu_backend_baseline, true}};
#endif
    const char* wanted = std::getenv("LLC_FAST_ISA");
    for (const Candidate& candidate : candidates) {
        if (wanted == nullptr ? candidate.runs_here : candidate.backend->name == std::string(wanted)) {
            if (!candidate.runs_here) {
                throw std::runtime_error("LLC_FAST_ISA=" + std::string(wanted) +
                                         ": this machine lacks these instructions; unset it to choose automatically");
            }
            return *candidate.backend;
        }
    }
    std::string names;
    for (const Candidate& candidate : candidates) names += std::string(" ") + candidate.backend->name;
    throw std::runtime_error("LLC_FAST_ISA=" + std::string(wanted) + " is not one of:" + names);
}

}  // namespace

const CpuBackend& cpu_backend() {
    static const CpuBackend& backend = choose();
    return backend;
}

Multiply multiply_function() {
#ifdef LLC_X86_ISAS
    if (&cpu_backend() == &cpu_backend_avx512) return multiply_avx512;
    if (&cpu_backend() == &cpu_backend_avx2) return multiply_avx2;
#endif
    return nullptr;
}

}  // namespace llc
