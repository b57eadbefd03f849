// A `cuda` device for a torch built without CUDA: tensors in the CPU's memory that say they are on a GPU. Operations on
// them run on the CPU, autograd and vmap take them for what they say they are, and what mixes devices fails.
//
// While a graph is captured operations are kept instead of run, and what would wait for a result fails; replaying runs
// them in the memory that they were captured with.
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <ATen/native/Resize.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/set_native.h>
#include <c10/core/impl/FakeGuardImpl.h>
#include <c10/core/impl/alloc_cpu.h>
#include <torch/library.h>

#include <atomic>
#include <functional>
#include <set>
#include <vector>

namespace at {

struct CUDAHooks final : CUDAHooksInterface {
    explicit CUDAHooks(CUDAHooksArgs) {}
    void init() const override {}
    bool hasCUDA() const override { return true; }
    bool isBuilt() const override { return true; }
    bool isAvailable() const override { return true; }
    bool hasPrimaryContext(DeviceIndex) const override { return true; }
    DeviceIndex deviceCount() const override { return 1; }
    DeviceIndex current_device() const override { return 0; }
    DeviceIndex getCurrentDevice() const override { return 0; }
    int getNumGPUs() const override { return 1; }
    bool isPinnedPtr(const void*) const override { return false; }
};
REGISTER_CUDA_HOOKS(CUDAHooks);

}  // namespace at

namespace {

const c10::impl::FakeGuardImpl<c10::DeviceType::CUDA> guard;
const c10::impl::DeviceGuardImplRegistrar registered(c10::DeviceType::CUDA, &guard);
const c10::Device kGpu(c10::DeviceType::CUDA, 0);

bool capturing = false;
std::set<void*> captured;  // memory of the graph's own, in which anything may stand until it is replayed

std::atomic<size_t> allocated{0};
size_t peak = 0;

// With a margin on both sides that nobody may write to.
struct Allocator final : c10::Allocator {
    static constexpr size_t kMargin = 256;
    static constexpr unsigned char kUntouched = 0xA5;

    c10::DataPtr allocate(size_t bytes) override {
        auto* whole = static_cast<unsigned char*>(c10::alloc_cpu(bytes + 2 * kMargin));
        std::memset(whole, kUntouched, bytes + 2 * kMargin);
        std::memcpy(whole, &bytes, sizeof(bytes));
        unsigned char* data = whole + kMargin;
        std::memset(data, 0xFF, bytes);  // NaN: nobody may read what nobody wrote
        if (capturing) captured.insert(data);
        allocated += bytes;
        peak = std::max<size_t>(peak, allocated);
        return {data, data, &free, kGpu};
    }
    static void free(void* data) {
        if (!data) return;
        auto* whole = static_cast<unsigned char*>(data) - kMargin;
        size_t bytes = 0;
        std::memcpy(&bytes, whole, sizeof(bytes));
        for (size_t k = sizeof(bytes); k < kMargin; ++k) {
            if (whole[k] != kUntouched || whole[kMargin + bytes + k - sizeof(bytes)] != kUntouched) {
                std::fprintf(stderr, "CUDA emulation: something wrote beside %zu bytes of memory\n", bytes);
                std::abort();
            }
        }
        allocated -= bytes;
        c10::free_cpu(whole);
    }
    c10::DeleterFnPtr raw_deleter() const override { return &free; }
    void copy_data(void* to, const void* from, size_t count) const override { std::memcpy(to, from, count); }
} allocator;

constexpr c10::DispatchKeySet kKeys(c10::DispatchKey::CUDA);

// ---- graphs ------------------------------------------------------------------------------------------------

using Graph = std::vector<std::function<void()>>;
std::vector<Graph> graphs;
bool refuses_to_wait = false;  // torch.cuda.set_sync_debug_mode("error")

// Before what makes the host wait for the GPU.
void wait(const std::string& what) {
    TORCH_CHECK(!capturing, what, ": operation not permitted when stream is capturing");
    TORCH_CHECK(!refuses_to_wait, what, ": called a synchronizing CUDA operation");
}

void write(const at::Tensor& to, std::function<void()> work) {
    // Shapes and indices that follow from it must make sense while they are captured.
    if (!capturing || captured.count(to.storage().mutable_data())) work();
    if (capturing) graphs.back().push_back(std::move(work));
}

// ---- tensors -----------------------------------------------------------------------------------------------

bool on_gpu(const at::Tensor& t) {
    return t.defined() && t.device().type() == c10::DeviceType::CUDA;
}

at::Tensor here(const at::Tensor& t) {  // the same memory as a tensor of the CPU
    if (!on_gpu(t)) return t;
    return at::from_blob(t.data_ptr(), t.sizes(), t.strides(), [keep = t](void*) {}, t.options().device(at::kCPU));
}

at::Tensor empty_strided(c10::SymIntArrayRef size, c10::SymIntArrayRef stride, std::optional<at::ScalarType> dtype,
                         std::optional<at::Layout>, std::optional<at::Device>, std::optional<bool>) {
    return at::detail::empty_strided_generic(C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride), &allocator,
                                             kKeys, c10::dtype_or_default(dtype));
}

at::Tensor empty(c10::SymIntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
                 std::optional<at::Device>, std::optional<bool>, std::optional<at::MemoryFormat> format) {
    return at::detail::empty_generic(C10_AS_INTARRAYREF_SLOW(size), &allocator, kKeys, c10::dtype_or_default(dtype),
                                     format);
}

at::Tensor gpu_like(const at::Tensor& t) {
    return at::detail::empty_strided_generic(t.sizes(), t.strides(), &allocator, kKeys, t.scalar_type());
}

at::Tensor& copy_(at::Tensor& self, const at::Tensor& source, bool non_blocking) {
    if (on_gpu(self) != on_gpu(source) && (capturing || !non_blocking)) wait("a copy between CPU and GPU");
    write(self, [to = here(self), from = here(source)]() mutable { to.copy_(from); });
    return self;
}

at::Tensor& set_storage(at::Tensor& self, at::Storage storage, c10::SymInt offset, c10::SymIntArrayRef size,
                        c10::SymIntArrayRef stride) {
    return at::native::set_storage_cpu_(self, std::move(storage), offset.expect_int(), C10_AS_INTARRAYREF_SLOW(size),
                                        C10_AS_INTARRAYREF_SLOW(stride));
}

const at::Tensor& resize_(const at::Tensor& self, c10::SymIntArrayRef size, std::optional<at::MemoryFormat>) {
    const auto wanted = C10_AS_INTARRAYREF_SLOW(size);
    if (self.sizes() != wanted) {
        c10::TensorImpl* tensor = self.unsafeGetTensorImpl();
        const size_t bytes = size_t(c10::multiply_integers(wanted)) * self.itemsize();
        if (size_t(self.storage().nbytes()) < bytes) {
            tensor->set_storage_keep_dtype(gpu_like(at::empty(wanted, self.options().device(at::kCPU))).storage());
        }
        tensor->set_sizes_contiguous(wanted);
    }
    return self;
}

// ---- every other operation ---------------------------------------------------------------------------------

bool takes_indices_of_the_cpu(const std::string& name) {
    return name.find("index") != std::string::npos;
}

at::Tensor& random_state() {
    static at::Tensor state = at::detail::createCPUGenerator(0x5EED).get_state();
    return state;
}

void call_here(const c10::OperatorHandle& op, torch::jit::Stack& stack) {
    for (auto& value : stack) {
        if (value.isTensor()) {
            value = here(value.toTensor());
        } else if (value.isTensorList()) {
            std::vector<at::Tensor> list = value.toTensorVector();
            for (auto& t : list) t = here(t);
            value = list;
        } else if (value.isOptionalTensorList()) {
            c10::List<std::optional<at::Tensor>> list;
            for (std::optional<at::Tensor> t : value.toOptionalTensorVector()) {
                list.push_back(t ? std::optional<at::Tensor>(here(*t)) : t);
            }
            value = list;
        } else if (value.isDevice()) {
            value = c10::Device(at::kCPU);
        }
    }
    if (!op.hasTag(at::Tag::nondeterministic_seeded)) return op.callBoxed(&stack);
    // A GPU draws from a generator of its own.
    const at::Generator generator = at::detail::getDefaultCPUGenerator();
    const at::Tensor before = generator.get_state();
    const_cast<at::Generator&>(generator).set_state(random_state());
    op.callBoxed(&stack);
    random_state() = generator.get_state();
    const_cast<at::Generator&>(generator).set_state(before);
}

c10::IValue to_gpu(const c10::IValue& value) {
    if (value.isTensor() && value.toTensor().defined()) {
        const at::Tensor t = value.toTensor(), out = gpu_like(t);
        here(out).copy_(t);
        return out;
    }
    if (value.isTensorList()) {
        std::vector<at::Tensor> list = value.toTensorVector();
        for (auto& t : list) t = to_gpu(t).toTensor();
        return list;
    }
    return value;
}

void refill(const c10::IValue& place, const c10::IValue& value) {
    if (place.isTensor() && place.toTensor().defined()) here(place.toTensor()).copy_(value.toTensor());
    if (place.isTensorList()) {
        const auto to = place.toTensorVector(), from = value.toTensorVector();
        for (size_t k = 0; k < to.size(); ++k) here(to[k]).copy_(from[k]);
    }
}

// Views of the first argument: what the CPU makes of it tells their shape and place.
void push_views(const c10::OperatorHandle& op, const torch::jit::Stack& given, torch::jit::Stack* stack) {
    const at::Tensor base = given[0].toTensor();
    torch::jit::Stack views = given;
    call_here(op, views);
    const auto like = [&](const at::Tensor& view) {
        TORCH_CHECK(view.scalar_type() == base.scalar_type(), op.schema(), " changes the dtype");
        const auto* from = static_cast<const char*>(base.data_ptr());
        const int64_t offset = (static_cast<const char*>(view.data_ptr()) - from) / int64_t(base.itemsize());
        return at::native::as_strided_tensorimpl(base, view.sizes(), view.strides(), base.storage_offset() + offset);
    };
    for (const c10::IValue& value : views) {
        if (value.isTensor()) {
            stack->push_back(like(value.toTensor()));
        } else {
            std::vector<at::Tensor> list = value.toTensorVector();
            for (auto& t : list) t = like(t);
            stack->push_back(list);
        }
    }
}

void fallback(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
    const c10::FunctionSchema& schema = op.schema();
    const std::string name = schema.operator_name().name;
    const size_t count = schema.arguments().size();
    torch::jit::Stack given(stack->end() - int64_t(count), stack->end());
    at::Tensor written;
    bool mixes = false, writes = false, reads_other = false;
    for (size_t k = 0; k < count; ++k) {
        const auto* alias = schema.arguments()[k].alias_info();
        if (alias && alias->isWrite()) {
            writes = true;
            written = given[k].isTensor() ? given[k].toTensor() : given[k].toTensorVector().at(0);
        }
        const auto look = [&](const at::Tensor& t) {
            if (t.defined() && !on_gpu(t) && t.dim() > 0)
                (k > 0 && takes_indices_of_the_cpu(name) ? reads_other : mixes) = true;
        };
        if (given[k].isTensor()) look(given[k].toTensor());
        if (given[k].isTensorList()) {
            for (const at::Tensor& t : given[k].toTensorVector()) look(t);
        }
        if (given[k].isOptionalTensorList()) {
            for (const auto& t : given[k].toOptionalTensorVector()) {
                if (t) look(*t);
            }
        }
    }
    TORCH_CHECK(!mixes, name,
                ": Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu!");
    bool waits = reads_other || name == "aten::nonzero" || name == "aten::masked_select" || name == "aten::unique_dim";
    for (const auto& r : schema.returns())
        waits |= !r.type()->isSubtypeOf(*c10::TensorType::get()) && r.type()->kind() != c10::TypeKind::ListType;
    if (waits) wait(name);

    torch::jit::drop(*stack, count);
    if (!writes && schema.hasAnyAliasInfo()) return push_views(op, given, stack);
    const auto run = [op, given] {
        torch::jit::Stack inside = given;
        call_here(op, inside);
        return inside;
    };
    if (writes) {
        for (size_t k = 0; k < count; ++k) {  // an empty `out` takes the shape of what is written
            const auto& argument = schema.arguments()[k];
            if (!argument.alias_info() || !argument.kwarg_only() || !given[k].isTensor()) continue;
            const at::Tensor out = given[k].toTensor();
            if (out.numel() > 0) continue;
            torch::jit::Stack inside = given;
            inside[k] = at::empty({0}, out.options().device(at::kCPU));
            const at::Tensor shaped = inside[k].toTensor();
            call_here(op, inside);
            resize_(out, c10::fromIntArrayRefSlow(shaped.sizes()), std::nullopt);
        }
        write(written, [run] { run(); });
        for (const auto& r : schema.returns()) {  // the arguments that were written
            TORCH_CHECK(r.alias_info(), name, " writes to an argument and returns something new");
            for (size_t k = 0; k < count; ++k) {
                const auto* alias = schema.arguments()[k].alias_info();
                if (alias && alias->isWrite() && alias->beforeSets() == r.alias_info()->beforeSets()) {
                    stack->push_back(given[k]);
                }
            }
        }
        return;
    }
    // While capturing this tells the shapes of the outputs; their values come with the replay.
    torch::jit::Stack outputs;
    for (const c10::IValue& value : run()) outputs.push_back(to_gpu(value));
    if (capturing) {
        graphs.back().push_back([run, outputs] {
            const torch::jit::Stack values = run();
            for (size_t k = 0; k < values.size(); ++k) refill(outputs[k], values[k]);
        });
    }
    stack->insert(stack->end(), outputs.begin(), outputs.end());
}

TORCH_LIBRARY_IMPL(_, CUDA, m) {
    m.fallback(torch::CppFunction::makeFromBoxedFunction<&fallback>());
}

TORCH_LIBRARY_IMPL(aten, CUDA, m) {
    m.impl("empty.memory_format", empty);
    m.impl("empty_strided", empty_strided);
    m.impl("copy_", copy_);
    m.impl("as_strided", at::native::as_strided_tensorimpl);
    m.impl("resize_", resize_);
    m.impl("set_.source_Storage_storage_offset", set_storage);
    m.impl("set_.source_Storage", [](at::Tensor& self, at::Storage storage) -> at::Tensor& {
        const c10::SymInt size = storage.nbytes() / self.itemsize(), stride = 1;
        return set_storage(self, std::move(storage), 0, size, stride);
    });
    // Pieced together from kernels that only a GPU has.
    for (const char* name : {"convolution", "convolution_backward", "_convolution"}) {
        m.impl(name, torch::CppFunction::makeFromBoxedFunction<&fallback>());
    }
    // What has a kernel of its own on a CPU would have one here: torch must not piece it together from others.
    auto& torch = c10::Dispatcher::singleton();
    for (const c10::OperatorName& name : torch.getRegistrationsForDispatchKey(c10::DispatchKey::CPU)) {
        const auto op = torch.findOp(name);
        if (name.name.rfind("aten::", 0) != 0 || !op || op->hasKernelForDispatchKey(c10::DispatchKey::CUDA)) continue;
        const std::string overload = name.overload_name.empty() ? "" : "." + name.overload_name;
        m.impl((name.name + overload).c_str(), torch::CppFunction::makeFromBoxedFunction<&fallback>());
    }
}

}  // namespace

extern "C" {
void begin_capture() {
    graphs.emplace_back();
    capturing = true;
}
int end_capture() {
    capturing = false;
    captured.clear();
    return int(graphs.size()) - 1;
}
int is_capturing() {
    return capturing;
}
void refuse_to_wait(int refuse) {
    refuses_to_wait = refuse;
}
void keep(void (*launch)()) {
    graphs.back().push_back(launch);
}
size_t peak_memory(const char*) {
    return peak;
}
void forget_peak_memory(const char*) {
    peak = allocated;
}
void* random_state_bytes() {
    return random_state().data_ptr();
}
void replay(int graph) {
    for (const auto& work : graphs[size_t(graph)]) work();
}
}
