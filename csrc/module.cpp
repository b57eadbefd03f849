// pybind11: the only file that knows Python. It takes addresses as integers; llc_fast/kernels/native.py has checked
// them.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstddef>
#include <cstring>
#include <map>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

#include "replay.h"
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

template <class T>
T* pointer(std::optional<uintptr_t> address) {
    return reinterpret_cast<T*>(address.value_or(0));
}

// Lets other Python threads run during work on this many elements. For a few microseconds it is not worth it: another
// thread takes the interpreter, and getting it back can take longer than the work.
class Unlocked {
  public:
    explicit Unlocked(int64_t elements) {
        if (elements >= kWorthIt) released_.emplace();
    }

  private:
    static constexpr int64_t kWorthIt = 1 << 15;
    std::optional<py::gil_scoped_release> released_;
};

// pybind11's own conversion to an array takes five times as long, and this runs at every step.
llc::Scalars scalars_of(const py::tuple& numbers) {
    std::array<double, sizeof(llc::Scalars) / sizeof(double)> fields;
    if (numbers.size() != fields.size()) throw std::invalid_argument("scalars must have the fields of StepScalars");
    for (size_t k = 0; k < fields.size(); ++k) {
        fields[k] = PyFloat_AsDouble(PyTuple_GET_ITEM(numbers.ptr(), Py_ssize_t(k)));
        if (fields[k] == -1 && PyErr_Occurred()) throw py::error_already_set();
    }
    llc::Scalars scalars;
    std::memcpy(&scalars, fields.data(), sizeof(scalars));
    return scalars;
}

// `segments`: address of a table of llc::Segment, in the memory of the device that runs the step. `scalars`: the fields
// of llc::Scalars, in their order. `rule`, `dtype` and `low`: places in the lists of interface(); `low_reference`:
// 0, 1. `stream`: a cudaStream_t, or None to run on the CPU.
void step(int rule, int dtype, int low, int low_reference, int64_t num_segments, int64_t begin, int64_t end,
          int64_t num_chains, uintptr_t segments, const py::tuple& scalars, uint64_t seed, uint64_t step_index,
          uint32_t chain, std::optional<uintptr_t> thermostat, llc::SumSet wanted, std::optional<uintptr_t> sums,
          std::optional<uintptr_t> scratch, std::optional<uintptr_t> device_scalars,
          std::optional<uintptr_t> device_step, int num_threads, std::optional<uintptr_t> stream) {
    llc::Step request{};
    request.rule = llc::Rule(rule);
    request.dtype = DType(dtype);
    request.low = llc::Low(low), request.low_reference = low_reference != 0;
    request.segments = reinterpret_cast<const llc::Segment*>(segments);
    request.num_segments = num_segments;
    request.begin = begin, request.end = end;
    request.num_chains = num_chains;
    request.scalars = scalars_of(scalars);
    request.key = {seed, step_index, chain, 0};
    request.thermostat = pointer<const double>(thermostat);
    request.wanted = sums ? wanted : 0;
    request.sums = pointer<double>(sums);
    request.scratch = pointer<double>(scratch);
    request.device_scalars = pointer<const llc::Scalars>(device_scalars);
    request.device_step = pointer<const int64_t>(device_step);
    const Unlocked unlocked((end - begin) * num_chains);
    if (!stream) return llc::cpu_backend().step(request, num_threads);
#ifdef LLC_WITH_CUDA
    llc::cuda_step(request, reinterpret_cast<void*>(*stream));
#else
    no_cuda();
#endif
}

int64_t scratch_size(int64_t begin, int64_t end, int64_t num_chains) {
#ifdef LLC_WITH_CUDA
    llc::Step request{};
    request.begin = begin, request.end = end, request.num_chains = num_chains;
    return llc::cuda_scratch_size(request);
#else
    (void)begin, (void)end, (void)num_chains;
    no_cuda();
#endif
}

void normals(const std::string& dtype, uintptr_t out, int64_t begin, int64_t length, uint64_t seed, uint64_t step_index,
             uint32_t chain, uint32_t stream_id, std::optional<uintptr_t> stream) {
    const llc::Normals request{
        dtype_named(dtype), reinterpret_cast<void*>(out), begin, length, {seed, step_index, chain, stream_id}};
    const Unlocked unlocked(length);
    if (!stream) return llc::cpu_backend().normals(request);
#ifdef LLC_WITH_CUDA
    llc::cuda_normals(request, reinterpret_cast<void*>(*stream));
#else
    no_cuda();
#endif
}

void minibatch(uintptr_t out, int64_t num_samples, int64_t batch_size, int64_t num_chains, uint64_t seed,
               uint64_t step_index, uint32_t chain, std::optional<uintptr_t> device_step,
               std::optional<uintptr_t> stream) {
    const llc::Minibatch request{reinterpret_cast<int64_t*>(out),
                                 num_samples,
                                 batch_size,
                                 num_chains,
                                 {seed, step_index, chain, llc::kMinibatchStream},
                                 pointer<const int64_t>(device_step)};
    const Unlocked unlocked(batch_size * num_chains);
    if (!stream) return llc::cpu_backend().minibatch(request);
#ifdef LLC_WITH_CUDA
    llc::cuda_minibatch(request, reinterpret_cast<void*>(*stream));
#else
    no_cuda();
#endif
}

// NumPy's name for the type of a field; addresses are int64.
template <class Field>
std::string format() {
    using Element = std::remove_all_extents_t<Field>;
    static_assert(sizeof(Element) == 8, "tables have fields of eight bytes");
    const std::string element = std::is_floating_point_v<Element> ? "f8" : "i8";
    if constexpr (std::is_array_v<Field>) return std::to_string(std::extent_v<Field>) + element;
    return element;
}

// A table's layout, as numpy.dtype takes it.
class Layout {
  public:
    explicit Layout(size_t itemsize) : itemsize_(itemsize) {}

    template <class Field>
    void add(const char* name, size_t offset) {
        names_.append(name), formats_.append(format<Field>()), offsets_.append(offset);
        size_ += sizeof(Field);
    }

    py::dict finished() const {
        if (size_ != itemsize_) throw std::logic_error("a layout in module.cpp lacks a field");
        py::dict d;
        d["names"] = names_, d["formats"] = formats_, d["offsets"] = offsets_, d["itemsize"] = itemsize_;
        return d;
    }

  private:
    py::list names_, formats_, offsets_;
    size_t itemsize_, size_ = 0;
};

#define LLC_FIELD(type, name) layout.add<decltype(llc::type::name)>(#name, offsetof(llc::type, name))

py::dict segment_layout() {
    Layout layout(sizeof(llc::Segment));
    LLC_FIELD(Segment, offset);
    LLC_FIELD(Segment, length);
    LLC_FIELD(Segment, w);
    LLC_FIELD(Segment, stride);
    LLC_FIELD(Segment, grad);
    LLC_FIELD(Segment, grad_stride);
    LLC_FIELD(Segment, reference);
    LLC_FIELD(Segment, reference_stride);
    LLC_FIELD(Segment, mask);
    LLC_FIELD(Segment, state);
    LLC_FIELD(Segment, preconditioner);
    LLC_FIELD(Segment, preconditioner_scale);
    LLC_FIELD(Segment, copy);
    return layout.finished();
}

py::dict scalars_layout() {
    Layout layout(sizeof(llc::Scalars));
    LLC_FIELD(Scalars, lr);
    LLC_FIELD(Scalars, nbeta);
    LLC_FIELD(Scalars, localization);
    LLC_FIELD(Scalars, weight_decay);
    LLC_FIELD(Scalars, noise_level);
    LLC_FIELD(Scalars, bounding_box);
    LLC_FIELD(Scalars, decay);
    LLC_FIELD(Scalars, momentum_decay);
    LLC_FIELD(Scalars, eps);
    LLC_FIELD(Scalars, friction);
    LLC_FIELD(Scalars, adapt_steps);
    LLC_FIELD(Scalars, in_metric);
    return layout.finished();
}

// Functions of torch by the names of their fields; 0: this torch has none.
llc::TorchFunctions torch_functions(const std::map<std::string, uintptr_t>& addresses) {
    llc::TorchFunctions f{};
#define LLC_FUNCTION(field) f.field = reinterpret_cast<decltype(f.field)>(addresses.at(#field))
    LLC_FUNCTION(grad_mode_is_enabled);
    LLC_FUNCTION(grad_mode_set_enabled);
    LLC_FUNCTION(delete_tensor);
    LLC_FUNCTION(new_tensor);
    LLC_FUNCTION(data);
    LLC_FUNCTION(copy_);
    LLC_FUNCTION(abi_version);
    LLC_FUNCTION(call_dispatcher);
    LLC_FUNCTION(new_list);
    LLC_FUNCTION(push_back);
    LLC_FUNCTION(new_optional);
    LLC_FUNCTION(item);
#undef LLC_FUNCTION
    return f;
}

// A pair: what it is, and its value.
llc::Argument argument_of(const py::handle& value) {
    const auto pair = py::cast<py::tuple>(value);
    const auto kind = py::cast<std::string>(pair[0]);
    llc::Argument argument;
    using Kind = llc::Argument::Kind;
    if (kind == "bits" || kind == "tensor") {
        argument.kind = kind == "bits" ? Kind::bits : Kind::tensor;
        argument.bits = py::cast<uint64_t>(pair[1]);
    } else if (kind == "optional") {
        argument.kind = Kind::optional;
        argument.items.push_back(argument_of(pair[1]));
    } else if (kind == "list") {
        argument.kind = Kind::list;
        for (const py::handle item : py::cast<py::list>(pair[1])) argument.items.push_back(argument_of(item));
    } else {
        throw std::invalid_argument("an argument must be bits, tensor, optional or list, not " + kind);
    }
    return argument;
}

// The fields of llc::Product, in their order.
using ProductFields = std::array<int64_t, sizeof(llc::Product) / sizeof(int64_t)>;

llc::Product product_of(const ProductFields& fields) {
    llc::Product product;
    std::memcpy(&product, fields.data(), sizeof(product));
    return product;
}

void multiply(const ProductFields& fields, uintptr_t a, uintptr_t b, std::optional<uintptr_t> bias, uintptr_t c,
              int num_threads) {
    auto* const function = llc::multiply_function();
    if (!function) throw std::runtime_error("there is no function for products on this machine");
    const llc::Product product = product_of(fields);
    const py::gil_scoped_release released;
    function(product, reinterpret_cast<const float*>(a), reinterpret_cast<const float*>(b), pointer<const float>(bias),
             reinterpret_cast<float*>(c), num_threads);
}

void bind_program(py::module_& m) {
    py::class_<llc::Program>(m, "Program")
        .def(py::init([](const std::map<std::string, uintptr_t>& addresses) {
            return std::make_unique<llc::Program>(torch_functions(addresses));
        }))
        .def("add_tensor",
             [](llc::Program& p, uintptr_t handle) { return p.add_tensor(reinterpret_cast<void*>(handle)); })
        .def("add_scalar", &llc::Program::add_scalar)
        .def("add_text", &llc::Program::add_text)
        .def("add_call",
             [](llc::Program& p, uintptr_t function, const std::vector<size_t>& operands) {
                 p.add_call(reinterpret_cast<void*>(function), operands);
             })
        .def("add_dispatch",
             [](llc::Program& p, const std::string& name, const std::string& overload, const py::list& arguments,
                size_t num_results, const std::vector<std::optional<size_t>>& targets) {
                 std::vector<llc::Argument> given;
                 for (const py::handle argument : arguments) given.push_back(argument_of(argument));
                 std::vector<size_t> places;
                 for (const auto& target : targets) places.push_back(target.value_or(llc::Program::kNowhere));
                 p.add_dispatch(name, overload, std::move(given), num_results, std::move(places));
             })
        .def("add_product",
             [](llc::Program& p, const ProductFields& fields, size_t a, size_t b, std::optional<size_t> bias,
                size_t c) { p.add_product(product_of(fields), a, b, bias.value_or(llc::Program::kNowhere), c); })
        .def("add_stop", &llc::Program::add_stop)
        .def("run", py::overload_cast<size_t, int>(&llc::Program::run, py::const_),
             py::call_guard<py::gil_scoped_release>());
}

// What the package's Python must agree with; llc_fast/kernels/native.py compares it when it is imported.
template <class... Arguments>
constexpr int count_arguments(void (*)(Arguments...)) {
    return sizeof...(Arguments);
}

py::dict interface() {
    py::list sums, rules;
#define LLC_APPEND(sum, name) sums.append(name);
    LLC_SUMS(LLC_APPEND)
#undef LLC_APPEND
#define LLC_APPEND(type, name) rules.append(name);
    LLC_RULES(LLC_APPEND)
#undef LLC_APPEND
    // In the order of DType and Low.
    py::list dtypes, low;
    for (const char* name : {"float32", "float64"}) dtypes.append(name);
    for (const char* name : {"", "bfloat16", "float16"}) low.append(name);
    py::dict d;
    d["dtypes"] = dtypes, d["low"] = low;
    d["Segment"] = segment_layout(), d["Scalars"] = scalars_layout(), d["sums"] = sums, d["rules"] = rules;
    d["step_arguments"] = count_arguments(&step);
    return d;
}

py::dict info() {
    py::dict d;
    d["instruction_set"] = llc::cpu_backend().name;
    d["philox_rounds"] = llc::kPhiloxRounds;
    py::dict rules;  // name -> tensors like w that the rule keeps between steps; in the order of llc::Rule
#define LLC_DESCRIBE(type, name) rules[name] = int(llc::type<float>::kStates);
    LLC_RULES(LLC_DESCRIBE)
#undef LLC_DESCRIBE
    d["rules"] = rules;
#ifdef LLC_NO_OPENMP
    d["openmp"] = false;
#else
    d["openmp"] = true;
#endif
#ifdef LLC_SANITIZED
    d["sanitized"] = true;
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
    m.doc() = "The compiled part of llc_fast. Use llc_fast.kernels.native, which checks what it passes here.";
    m.def("step", &step);
    m.def("scratch_size", &scratch_size);
    m.def("normals", &normals);
    m.def("minibatch", &minibatch);
    m.def("has_products", [] { return llc::multiply_function() != nullptr; });
    m.def("multiply", &multiply);
    m.def("interface", &interface);
    m.def("info", &info);
    bind_program(m);
}
