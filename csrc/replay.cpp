#include "replay.h"

#include <stdexcept>
#include <utility>

namespace llc {

namespace {

// `at::Tensor&`, `const at::Tensor&` and `const c10::Scalar&` are addresses to every compiler that torch is built with,
// and a std::string_view is two words to those on Linux, as long as all fit into registers: six on x86-64.
template <size_t... I>
void call(void* function, void* const* operands, std::index_sequence<I...>) {
    reinterpret_cast<void* (*)(decltype((void)I, (void*)nullptr)...)>(function)(operands[I]...);
}

void call(void* function, const std::vector<void*>& operands) {
    void* const* o = operands.data();
    switch (operands.size()) {
        case 1:
            return call(function, o, std::make_index_sequence<1>());
        case 2:
            return call(function, o, std::make_index_sequence<2>());
        case 3:
            return call(function, o, std::make_index_sequence<3>());
        case 4:
            return call(function, o, std::make_index_sequence<4>());
        case 5:
            return call(function, o, std::make_index_sequence<5>());
        case 6:
            return call(function, o, std::make_index_sequence<6>());
    }
}

class NoGrad {
  public:
    explicit NoGrad(const TorchFunctions& torch) : torch_(torch), was_(torch.grad_mode_is_enabled()) {
        torch_.grad_mode_set_enabled(false);
    }
    ~NoGrad() { torch_.grad_mode_set_enabled(was_); }

  private:
    const TorchFunctions& torch_;
    bool was_;
};

}  // namespace

Program::~Program() {
    for (void* tensor : tensors_) torch_.delete_tensor(tensor);
}

size_t Program::add_tensor(void* handle) {
    tensors_.push_back(handle);
    operands_.push_back(handle);
    return operands_.size() - 1;
}

size_t Program::add_scalar(size_t tensor) {
    if (!torch_.item) throw std::invalid_argument("this torch has no function that makes scalars");
    auto* item = reinterpret_cast<Scalar (*)(const void*)>(torch_.item);
    scalars_.emplace_back(new Scalar(item(operands_.at(tensor))));
    operands_.push_back(scalars_.back().get());
    return operands_.size() - 1;
}

size_t Program::add_text(std::string text) {
    texts_.emplace_back(new std::string(std::move(text)));
    operands_.push_back(reinterpret_cast<void*>(texts_.back()->size()));
    operands_.push_back(texts_.back()->data());
    return operands_.size() - 2;
}

void Program::add_call(void* function, const std::vector<size_t>& operands) {
    if (!function || operands.empty() || operands.size() > kMaxOperands) {
        throw std::invalid_argument("a call has a function and 1 to 6 operands");
    }
    Kernel kernel;
    kernel.function = function;
    for (size_t place : operands) kernel.operands.push_back(operands_.at(place));
    kernels_.push_back(std::move(kernel));
}

void Program::add_dispatch(std::string name, std::string overload, std::vector<Argument> arguments, size_t num_results,
                           std::vector<size_t> targets) {
    if (arguments.size() > kMaxStack || num_results > kMaxStack) throw std::invalid_argument("too many arguments");
    if (!targets.empty() && targets.size() != num_results) throw std::invalid_argument("a target for each result");
    for (size_t place : targets) {
        if (place != kNowhere) operands_.at(place);
    }
    Kernel kernel;
    kernel.name = std::move(name), kernel.overload = std::move(overload);
    kernel.arguments = std::move(arguments);
    kernel.num_results = num_results;
    kernel.targets = std::move(targets);
    kernels_.push_back(std::move(kernel));
}

void Program::add_product(const Product& product, size_t a, size_t b, size_t bias, size_t c) {
    if (!multiply_function() || !torch_.data) throw std::invalid_argument("there is no function for products");
    Kernel kernel;
    for (size_t place : {a, b, c}) kernel.operands.push_back(operands_.at(place));
    kernel.operands.push_back(bias == kNowhere ? nullptr : operands_.at(bias));
    kernel.product.reset(new Product(product));
    kernels_.push_back(std::move(kernel));
}

size_t Program::run(size_t first, int num_threads) const {
    const NoGrad no_grad(torch_);
    for (size_t k = first; k < kernels_.size(); ++k) {
        try {
            if (!run(kernels_[k], num_threads)) return k;
        } catch (...) {  // Python runs it again, and says what is wrong
            return k;
        }
    }
    return kernels_.size();
}

bool Program::run(const Kernel& kernel, int num_threads) const {
    if (kernel.product) return multiply(kernel, num_threads);
    if (!kernel.function) return !kernel.name.empty() && dispatch(kernel);
    call(kernel.function, kernel.operands);
    return true;
}

// Where the tensors are now: a tensor's memory may have moved since the last run.
bool Program::multiply(const Kernel& kernel, int num_threads) const {
    void* at[4] = {};
    for (size_t k = 0; k < 4; ++k) {
        void* tensor = kernel.operands[k];
        if (tensor && (torch_.data(tensor, &at[k]) || !at[k])) return false;
    }
    auto* const function = multiply_function();
    function(*kernel.product, static_cast<const float*>(at[0]), static_cast<const float*>(at[1]),
             static_cast<const float*>(at[3]), static_cast<float*>(at[2]), num_threads);
    return true;
}

bool Program::dispatch(const Kernel& kernel) const {
    uint64_t stack[kMaxStack];
    for (size_t k = 0; k < kernel.arguments.size(); ++k) {
        if (!make(kernel.arguments[k], stack[k])) return false;
    }
    if (torch_.call_dispatcher(kernel.name.c_str(), kernel.overload.c_str(), stack, torch_.abi_version())) return false;
    bool done = true;
    for (size_t k = 0; k < kernel.num_results; ++k) {
        void* result = reinterpret_cast<void*>(stack[k]);
        const size_t target = kernel.targets.empty() ? kNowhere : kernel.targets[k];
        if (target != kNowhere) done &= torch_.copy_(operands_[target], result, 0) == 0;
        torch_.delete_tensor(result);
    }
    return done;
}

// The dispatcher takes what it is given: a tensor is another reference to it, lists and the like are new.
bool Program::make(const Argument& argument, uint64_t& value) const {
    void* made = nullptr;
    switch (argument.kind) {
        case Argument::Kind::bits:
            value = argument.bits;
            return true;
        case Argument::Kind::tensor:
            if (torch_.new_tensor(operands_[argument.bits], &made)) return false;
            break;
        case Argument::Kind::optional: {
            uint64_t* inner = nullptr;
            if (torch_.new_optional ? torch_.new_optional(&inner) != 0 : (inner = new uint64_t) == nullptr)
                return false;
            if (!make(argument.items[0], *inner)) return false;
            made = inner;
            break;
        }
        case Argument::Kind::list:
            if (torch_.new_list(argument.items.size(), &made)) return false;
            for (const Argument& item : argument.items) {
                uint64_t inner;
                if (!make(item, inner) || torch_.push_back(made, inner)) return false;
            }
            break;
    }
    value = reinterpret_cast<uint64_t>(made);
    return true;
}

}  // namespace llc
