#include "gemm.hpp"

#include "threads.hpp"

namespace crsm {
namespace {

// Under this many multiply-adds, waking a thread costs more than it gains.
constexpr int64_t kWorthAThread = 200'000;

}  // namespace

void gemm(const PackedMatrix& b, int64_t rows_M, const float* a, int64_t a_row, int64_t a_column, float* c, int64_t c_row,
          const float* bias, bool accumulate, int threads) {
    const GemmTable& table = gemm_table();
    const int64_t panels = b.num_panels();
    if (rows_M < 1 || panels < 1) return;
    const int64_t work = rows_M * b.rows_K * b.columns_N;
    int64_t share = threads > 0 ? threads : num_threads();
    if (work / kWorthAThread < share) share = work / kWorthAThread;
    if (share <= 1) {
        table.gemm(b, rows_M, a, a_row, a_column, c, c_row, bias, accumulate, 0, panels);
        return;
    }
    // Slices of panels where there are many, else of rows; several per thread, so that a slow one is made up for.
    if (panels >= 4 * share || rows_M < 64) {
        const int64_t tasks = panels < 4 * share ? panels : 4 * share;
        parallel_for(tasks, static_cast<int>(share), [&](int64_t task) {
            table.gemm(b, rows_M, a, a_row, a_column, c, c_row, bias, accumulate, panels * task / tasks,
                       panels * (task + 1) / tasks);
        });
        return;
    }
    const int64_t tasks = 4 * share;
    parallel_for(tasks, static_cast<int>(share), [&](int64_t task) {
        const int64_t begin = rows_M * task / tasks, end = rows_M * (task + 1) / tasks;
        if (begin == end) return;
        table.gemm(b, end - begin, a + begin * a_row, a_row, a_column, c + begin * c_row, c_row, bias, accumulate, 0,
                   panels);
    });
}

PackedMatrix pack(const float* source, int64_t row, int64_t column, int64_t rows_K, int64_t columns_N, float* panels,
                  int threads) {
    PackedMatrix packed{rows_K, columns_N, WeightType::fp32, panels, nullptr};
    const int64_t count = packed.num_panels();
    const int wanted = rows_K * columns_N < kWorthAThread ? 1 : threads;
    parallel_for(count, wanted, [&](int64_t panel) {
        gemm_table().pack(source, row, column, rows_K, columns_N, panels, panel, panel + 1);
    });
    return packed;
}

}  // namespace crsm
