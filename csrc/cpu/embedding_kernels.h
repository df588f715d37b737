// What the embedding room's loops are told (raw memory, no tensors), and the table of them for each instruction set.
#pragma once
#include <cstdint>

namespace pk {

enum class TableDtype { kFloat, kDouble, kBFloat16, kHalf };
enum class BagMode { kNone, kSum, kMean, kMax };  // kNone: every id is an output row

struct Ids {
  const void* data;
  bool narrow;  // int32
  int64_t count;
};

// Positions of bag b: [begin(b), begin(b + 1)).
struct Bags {
  const int64_t* offsets;  // count + 1 of them; null: all bags have `length` positions
  int64_t length;
  int64_t count;

  int64_t begin(int64_t bag) const { return offsets ? offsets[bag] : bag * length; }
};

struct GatherArgs {
  Ids ids;
  const char* table;
  int64_t table_stride;  // bytes
  int64_t row;           // bytes
  char* out;
};

struct BagArgs {
  TableDtype dtype{};
  BagMode mode{};
  Ids ids{};
  Bags bags{};
  int64_t padding{};  // -1: none
  const void* table{};
  int64_t table_stride{}, cols{};  // elements
  const void* scale{};             // one a position, of the table's dtype; or null
  void* out{};
  int64_t out_stride{};  // elements, of maxima too
  int32_t* maxima{};     // (bags, cols): place in the bag of the first maximum, -1 for a bag without ids; or null
};

// dscale[p] = dy[bag of p] . table[id of p], divided by the size of the bag with `mean`.
struct ScaleArgs {
  TableDtype dtype;
  Ids ids;
  Bags bags;
  int64_t padding;
  const void* table;
  int64_t table_stride, cols;
  const void* dy;
  int64_t dy_stride;
  bool mean;
  void* out;
};

// A row of the gradient: the entries [begin, end) of the sorted list, all of one id. Entries are (id, position), the
// position in the low bits.
struct Run {
  int64_t begin, end;
  int64_t id;
  int64_t total;    // how often the id was given, inside bags or not
  int64_t partial;  // first of its rows of partial sums; -1: it is summed in one go
};

// A run longer than this is summed in pieces of this length, then over the pieces: the tree is the same for any number
// of threads, and one id repeated a million times is work for all of them.
constexpr int64_t kPiece = 1024;

struct SegmentArgs {
  TableDtype dtype{};
  const uint64_t* entries{};
  int64_t last{};  // entry whose row may be asked for ahead of its use
  uint64_t position_mask{};
  const Run* runs{};
  const void* dy{};
  int64_t dy_stride{}, cols{};
  const uint32_t* bag_of{};   // position -> row of dy; null: the position
  const void* coefficient{};  // position -> factor, float (double for double); or null
  const int32_t* maxima{};    // (bags, cols); or null. With it a row of dy counts in the columns that name the place
  const uint32_t* place{};    // position -> place in its bag, with maxima
  bool by_frequency{};
  void* partials{};  // rows of `cols`, float (double for double)
  void* out{};
  bool dense{};  // row of a run: its id; otherwise its number
};

// An optimizer's step on the row of each run; pykernels/ops/embedding/update.py has the formulas.
enum class RowRule { kSgd, kAdagrad, kRowwiseAdagrad, kAdam };

struct UpdateArgs {
  RowRule rule{};
  void* table{};
  int64_t table_stride{};  // elements
  void* state{};           // (rows, cols), of kRowwiseAdagrad (rows); float (double for double)
  void* second_state{};    // (rows, cols)
  double lr{}, weight_decay{}, eps{}, beta1{}, beta2{};
  double step_size{}, root_correction{};  // of Adam: lr / (1 - beta1^step), sqrt(1 - beta2^step)
  bool stochastic{};                      // round to bfloat16 by Philox words
  uint64_t seed{};
};

struct EmbeddingKernels {
  void (*gather)(const GatherArgs&, int64_t begin, int64_t end);               // positions
  void (*bag)(const BagArgs&, int64_t begin, int64_t end);                     // bags
  void (*scale)(const ScaleArgs&, int64_t begin, int64_t end);                 // bags
  void (*piece)(const SegmentArgs&, int64_t run, int64_t begin, int64_t end);  // pieces of one run -> partials
  void (*segment)(const SegmentArgs&, int64_t begin, int64_t end);             // runs -> out
};

const EmbeddingKernels* embedding_kernels_avx2();
const EmbeddingKernels* embedding_kernels_avx512();

// Sums the runs [begin, end) and steps their rows; `row` holds cols sums (float; double for double).
using UpdateKernel = void (*)(const SegmentArgs&, const UpdateArgs&, void* row, int64_t begin, int64_t end);
UpdateKernel embedding_update_avx2();
UpdateKernel embedding_update_avx512();

}  // namespace pk
