// pybind11: the only file that knows Python. It takes addresses as integers; llc_fast/update.py has checked
// them.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <stdexcept>
#include <string>

#include "step.h"

namespace py = pybind11;

namespace {

using llc::DType;

DType dtype_named(const std::string& name) {
    if (name == "float32") return DType::float32;
    if (name == "float64") return DType::float64;
    throw std::invalid_argument("dtype must be float32 or float64, not " + name);
}

#ifndef LLC_WITH_CUDA
[[noreturn]] void no_cuda() {
    throw std::runtime_error("llc_fast was built without CUDA: " LLC_NO_CUDA_REASON);
}
#endif

// `segments`: address of a table laid out as llc::Segment, in the memory of the device that runs the step.
// `stream`: a cudaStream_t, or None to run on the CPU.
void step(const std::string& dtype, uintptr_t segments, int64_t num_segments, int64_t begin, int64_t end,
          int64_t num_chains, double lr, double nbeta, double localization, double weight_decay, double noise_level,
          double bounding_box, uint64_t seed, uint64_t step_index, uint32_t chain, int num_threads,
          std::optional<uintptr_t> stream) {
    const llc::Step request{dtype_named(dtype),
                            reinterpret_cast<const llc::Segment*>(segments),
                            num_segments,
                            begin,
                            end,
                            num_chains,
                            {lr, nbeta, localization, weight_decay, noise_level, bounding_box},
                            {seed, step_index, chain, 0}};
    py::gil_scoped_release released;
    if (!stream) return llc::cpu_backend().step(request, num_threads);
#ifdef LLC_WITH_CUDA
    llc::cuda_step(request, reinterpret_cast<void*>(*stream));
#else
    no_cuda();
#endif
}

void normals(const std::string& dtype, uintptr_t out, int64_t begin, int64_t length, uint64_t seed, uint64_t step_index,
             uint32_t chain, uint32_t stream_id, std::optional<uintptr_t> stream) {
    const llc::Normals request{
        dtype_named(dtype), reinterpret_cast<void*>(out), begin, length, {seed, step_index, chain, stream_id}};
    py::gil_scoped_release released;
    if (!stream) return llc::cpu_backend().normals(request);
#ifdef LLC_WITH_CUDA
    llc::cuda_normals(request, reinterpret_cast<void*>(*stream));
#else
    no_cuda();
#endif
}

py::dict info() {
    py::dict d;
    d["instruction_set"] = llc::cpu_backend().name;
    d["philox_rounds"] = llc::kPhiloxRounds;
#ifdef LLC_NO_OPENMP
    d["openmp"] = false;
#else
    d["openmp"] = true;
#endif
#ifdef LLC_WITH_CUDA
    d["cuda"] = LLC_CUDA_VERSION;
    d["cuda_architectures"] = LLC_CUDA_ARCHS;
    d["cuda_devices"] = llc::cuda_device_count();
#else
    d["cuda"] = py::none();
    d["no_cuda_reason"] = LLC_NO_CUDA_REASON;
#endif
    return d;
}

}  // namespace

PYBIND11_MODULE(_native, m) {
    m.doc() = "The compiled part of llc_fast. Use llc_fast.update, which checks what it passes here.";
    m.def("step", &step);
    m.def("normals", &normals);
    m.def("info", &info);
}
