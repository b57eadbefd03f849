// Recorded kernels of torch, run again in one call. Addresses of torch's functions come from Python; neither this file
// nor the module includes or links torch.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "products.h"

namespace llc {

// Functions of torch's C interface, null where this torch has none, and one of C++.
struct TorchFunctions {
    bool (*grad_mode_is_enabled)();
    void (*grad_mode_set_enabled)(bool);
    int32_t (*delete_tensor)(void* tensor);
    int32_t (*new_tensor)(void* tensor, void** same);
    int32_t (*data)(void* tensor, void** address);
    int32_t (*copy_)(void* to, void* from, int32_t non_blocking);
    uint64_t (*abi_version)();
    int32_t (*call_dispatcher)(const char* name, const char* overload, uint64_t* stack, uint64_t version);
    int32_t (*new_list)(size_t size, void** list);
    int32_t (*push_back)(void* list, uint64_t value);
    int32_t (*new_optional)(uint64_t** value);
    void* item;  // at::_ops::item::call
};

// An argument of the dispatcher. No text: torch's interface leaves a copy of it behind in every call.
struct Argument {
    enum class Kind { bits, tensor, optional, list };
    Kind kind = Kind::bits;
    uint64_t bits = 0;  // a number, or the place of a tensor
    std::vector<Argument> items;
};

class Program {
  public:
    explicit Program(const TorchFunctions& torch) : torch_(torch) {}
    ~Program();
    Program(const Program&) = delete;
    Program& operator=(const Program&) = delete;

    // An operand: its place. The handle (at::Tensor*) is this program's from now on.
    size_t add_tensor(void* handle);
    // A c10::Scalar with the value of a tensor of one element: its place.
    size_t add_scalar(size_t tensor);

    // A std::string_view of text, passed by value: its length and, at the next place, its address.
    size_t add_text(std::string text);

    // A function of C++ whose arguments are references to these operands, or views of text.
    void add_call(void* function, const std::vector<size_t>& operands);
    // An operation by name. Its results are tensors, which are copied to those in `targets`; kNowhere: this one is not.
    void add_dispatch(std::string name, std::string overload, std::vector<Argument> arguments, size_t num_results,
                      std::vector<size_t> targets);
    // A product of the matrices in tensors, given by their places. kNowhere: there is no bias.
    void add_product(const Product& product, size_t a, size_t b, size_t bias, size_t c);
    // A kernel that somebody else runs.
    void add_stop() { kernels_.emplace_back(); }

    size_t size() const { return kernels_.size(); }
    // Runs kernels from number `first` on, with gradients off; products in as many threads as are allowed. Returns the
    // number of the first one that it has not run: a stop, one that has failed, or size(). Threads may run different
    // programs at a time.
    size_t run(size_t first, int num_threads) const;

    static constexpr size_t kNowhere = ~size_t(0);
    static constexpr size_t kMaxOperands = 6, kMaxStack = 32;

  private:
    // Larger than any c10::Scalar. Not trivial, so that it is returned in the caller's memory, as that is.
    struct Scalar {
        alignas(16) char bytes[128];
        Scalar() {}
        Scalar(const Scalar&);
        ~Scalar() {}  // a number holds nothing
    };
    struct Kernel {
        void* function = nullptr;  // of C++
        std::vector<void*> operands;
        std::string name, overload;  // of the dispatcher
        std::vector<Argument> arguments;
        size_t num_results = 0;
        std::vector<size_t> targets;
        std::unique_ptr<Product> product;
    };

    bool run(const Kernel& kernel, int num_threads) const;
    bool multiply(const Kernel& kernel, int num_threads) const;
    bool dispatch(const Kernel& kernel) const;
    bool make(const Argument& argument, uint64_t& value) const;

    TorchFunctions torch_;
    std::vector<void*> tensors_;
    std::vector<std::unique_ptr<Scalar>> scalars_;
    std::vector<std::unique_ptr<std::string>> texts_;
    std::vector<void*> operands_;
    std::vector<Kernel> kernels_;
};

}  // namespace llc
