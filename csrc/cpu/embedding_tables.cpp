#include "embedding_tables.h"

#include <ATen/Parallel.h>

#include <atomic>
#include <sstream>

#include "isa.h"

namespace pk {
namespace {

constexpr int64_t kGrain = 16384;  // elements a thread must have to be worth waking

// By sign bits alone, which vectors of any instruction set can do: of a negative id, and of what an id too large
// leaves.
template <class Id>
bool all_within(const Id* ids, int64_t count, int64_t rows) {
  using Unsigned = std::make_unsigned_t<Id>;
  if (rows == 0) return count == 0;
  const auto most = static_cast<Unsigned>(std::min<int64_t>(rows - 1, std::numeric_limits<Id>::max()));
  std::atomic<bool> good{true};
  at::parallel_for(0, count, kGrain, [&](int64_t begin, int64_t end) {
    Unsigned signs = 0;
    for (int64_t i = begin; i < end; ++i) {
      const auto id = static_cast<Unsigned>(ids[i]);
      signs |= id | (most - id);
    }
    if (signs >> (8 * sizeof(Id) - 1)) good.store(false, std::memory_order_relaxed);
  });
  return good.load();
}

}  // namespace

const EmbeddingKernels& embedding_kernels() {
  static const EmbeddingKernels* const table = isa() == Isa::kAvx512 ? embedding_kernels_avx512()
                                               : isa() == Isa::kAvx2 ? embedding_kernels_avx2()
                                                                     : nullptr;
  TORCH_CHECK(table, "pykernels: ", isa_refusal());
  return *table;
}

TableDtype table_dtype(const at::Tensor& table, const char* function) {
  switch (table.scalar_type()) {
    case at::kFloat:
      return TableDtype::kFloat;
    case at::kDouble:
      return TableDtype::kDouble;
    case at::kBFloat16:
      return TableDtype::kBFloat16;
    case at::kHalf:
      return TableDtype::kHalf;
    default:
      TORCH_CHECK_NOT_IMPLEMENTED(false, function, "(): expected float32, float64, bfloat16 or float16, got ",
                                  table.scalar_type());
  }
}

void check_ids(const at::Tensor& ids, int64_t rows, const char* function, const std::string& argument) {
  const bool narrow = ids.scalar_type() == at::kInt;
  const int64_t count = ids.numel();
  if (count == 0 || (narrow ? all_within(ids.const_data_ptr<int32_t>(), count, rows)
                            : all_within(ids.const_data_ptr<int64_t>(), count, rows))) {
    return;
  }
  const auto value = [&](int64_t i) -> int64_t {
    return narrow ? ids.const_data_ptr<int32_t>()[i] : ids.const_data_ptr<int64_t>()[i];
  };
  int64_t first = 0;
  while (value(first) >= 0 && value(first) < rows) ++first;
  std::ostringstream where;
  int64_t inner = count, rest = first;
  for (int64_t d = 0; d < ids.dim(); ++d) {
    inner /= ids.size(d);
    where << (d ? ", " : "[") << rest / inner;
    rest %= inner;
  }
  if (ids.dim()) where << "]";
  TORCH_CHECK_INDEX(false, function, "(): argument '", argument, "': ", argument, where.str(), " is ", value(first),
                    ", which is not in [0, ", rows, ")");
}

HeldIds::HeldIds(const at::Tensor& given, int64_t rows, const char* function, const std::string& argument)
    : tensor(given.contiguous()) {
  TORCH_CHECK(given.device().is_cpu() && (given.scalar_type() == at::kInt || given.scalar_type() == at::kLong),
              function, "(): argument '", argument, "' must be int32 or int64 on the CPU, not ", given.scalar_type(),
              " on ", given.device());
  check_ids(tensor, rows, function, argument);
  ids = {tensor.const_data_ptr(), tensor.scalar_type() == at::kInt, tensor.numel()};
}

at::Tensor with_rows(const at::Tensor& matrix) {
  return matrix.stride(1) == 1 || matrix.size(1) <= 1 ? matrix : matrix.contiguous();
}

HeldBags::HeldBags(const at::Tensor& ids, const std::optional<at::Tensor>& given, bool include_last_offset,
                   const char* function) {
  if (!given) {
    TORCH_CHECK(ids.dim() == 2, function, "(): the ids must be 2-D without offsets, not ", ids.dim(), "-D");
    bags = {nullptr, ids.size(1), ids.size(0)};
    limit = ids.numel();
    return;
  }
  const std::string name = std::string(function) + "(): argument 'offsets'";
  TORCH_CHECK(given->dim() == 1 && given->device().is_cpu() && !at::isFloatingType(given->scalar_type()), name,
              " must be 1-D, int32 or int64, on the CPU");
  const at::Tensor wide = given->to(at::kLong).contiguous();
  const int64_t* const p = wide.const_data_ptr<int64_t>();
  const int64_t size = wide.numel(), count = ids.numel();
  if (size) {
    TORCH_CHECK(p[0] == 0, name, ": offsets[0] must be 0, not ", p[0]);
    for (int64_t i = 0; i + 1 < size; ++i) {
      TORCH_CHECK_VALUE(p[i] <= p[i + 1], name, " must not decrease, but offsets[", i, "] is ", p[i], " and offsets[",
                        i + 1, "] is ", p[i + 1]);
    }
    TORCH_CHECK(p[size - 1] <= count, name, " must not exceed the length ", count, " of the ids, but offsets[-1] is ",
                p[size - 1]);
  }
  offsets.assign(p, p + size);
  if (!include_last_offset || size == 0) offsets.push_back(count);
  const int64_t number = static_cast<int64_t>(offsets.size()) - 1;
  bags = {offsets.data(), 0, number};
  limit = number ? offsets.back() : 0;
}

BagMode bag_mode(c10::string_view mode) {
  if (mode == "sum") return BagMode::kSum;
  if (mode == "mean") return BagMode::kMean;
  TORCH_CHECK(mode == "max", "embedding_bag(): argument 'mode' must be one of sum, mean, max, not '", mode, "'");
  return BagMode::kMax;
}

void for_bags(const Bags& bags, int64_t cols, const std::function<void(int64_t, int64_t)>& run) {
  // Work is the ids of a bag and one more for its output row; bag b begins at begin(b) + b of it.
  const auto bag_at = [&](int64_t work) {
    int64_t low = 0, high = bags.count;
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      if (bags.begin(middle) + middle < work) {
        low = middle + 1;
      } else {
        high = middle;
      }
    }
    return low;
  };
  const int64_t work = bags.count ? bags.begin(bags.count) + bags.count : 0;
  at::parallel_for(0, work, std::max<int64_t>(1, kGrain / std::max<int64_t>(cols, 1)),
                   [&](int64_t begin, int64_t end) { run(bag_at(begin), bag_at(end)); });
}

}  // namespace pk
