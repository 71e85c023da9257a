/* Y = W X and Z = WᵀY for a few columns in one walk over W: a group of rows is multiplied down and, while it still lies
   in the cache, up. BLAS walks W twice, and is far from its peak at such widths. */

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define MOST_PARTS 64

typedef float v8 __attribute__((vector_size(32), aligned(4)));

#ifdef __AVX512VL__
#define GROUP 8 /* 32 vector registers */
#else
#define GROUP 4
#endif

typedef struct Part {
    const float *w, *x;
    float *y, *z;
    int64_t low, high, n;
} Part;

/* R rows, V vectors of 8 columns: y_r = Σ_j w_rj x_j, then z_j += Σ_r w_rj y_r. */
#define DEFINE_GROUP(R, V)                                                                       \
    static void group_##R##_##V(const float *w, const float *x, float *y, float *z, int64_t n) { \
        v8 acc[R][V];                                                                            \
        memset(acc, 0, sizeof acc);                                                              \
        for (int64_t j = 0; j < n; j++) {                                                        \
            const v8 *xj = (const v8 *)(x + j * 8 * V);                                          \
            for (int r = 0; r < R; r++)                                                          \
                for (int v = 0; v < V; v++) acc[r][v] += w[r * n + j] * xj[v];                   \
        }                                                                                        \
        for (int r = 0; r < R; r++)                                                              \
            for (int v = 0; v < V; v++) ((v8 *)(y + r * 8 * V))[v] = acc[r][v];                  \
        for (int64_t j = 0; j < n; j++) {                                                        \
            v8 *zj = (v8 *)(z + j * 8 * V);                                                      \
            v8 sum[V];                                                                           \
            for (int v = 0; v < V; v++) sum[v] = zj[v];                                          \
            for (int r = 0; r < R; r++)                                                          \
                for (int v = 0; v < V; v++) sum[v] += w[r * n + j] * acc[r][v];                  \
            for (int v = 0; v < V; v++) zj[v] = sum[v];                                          \
        }                                                                                        \
    }

#define DEFINE_WALK(R, V)                                                                          \
    DEFINE_GROUP(R, V)                                                                             \
    DEFINE_GROUP(1, V)                                                                             \
    static void walk_##V(const Part *p) {                                                          \
        int64_t i = p->low;                                                                        \
        for (; i + R <= p->high; i += R)                                                           \
            group_##R##_##V(p->w + i * p->n, p->x, p->y + i * 8 * V, p->z, p->n);                  \
        for (; i < p->high; i++) group_1_##V(p->w + i * p->n, p->x, p->y + i * 8 * V, p->z, p->n); \
    }
#define DEFINE(R, V) DEFINE_WALK(R, V) /* expands GROUP before it is pasted */

DEFINE(GROUP, 1)
DEFINE(GROUP, 2)
DEFINE(GROUP, 3)

/* W (rows, n), X (n, width) -> Y (rows, width), Z (n, width), all row-major and dense; width 8, 16 or 24. Rows are shared
   out evenly, and the parts of Z added in their order: the bits depend on `threads` alone. Nonzero: not done. */
int both_products_f32(int64_t rows, int64_t n, int64_t width, const float *w, const float *x, float *y, float *z,
                      int threads) {
    static void (*const walks[])(const Part *) = {NULL, walk_1, walk_2, walk_3};
    if (width % 8 || width < 8 || width > 24) return 1;
    void (*const walk)(const Part *) = walks[width / 8];
    const int parts = threads < 1 ? 1 : threads > MOST_PARTS ? MOST_PARTS : threads;
    const size_t size = (size_t)n * (size_t)width;
    float *extra = parts > 1 ? calloc(size * (size_t)(parts - 1), sizeof *extra) : NULL;
    if (parts > 1 && !extra) return 1;
    memset(z, 0, size * sizeof *z);
    Part part[MOST_PARTS];
    for (int k = 0; k < parts; k++)
        part[k] = (Part){w, x, y, k ? extra + size * (size_t)(k - 1) : z, rows * k / parts, rows * (k + 1) / parts, n};
    /* OpenMP, because torch's own idle threads spin for a while: others would have to share the cores with them. */
#pragma omp parallel for schedule(static, 1) num_threads(parts)
    for (int k = 0; k < parts; k++) walk(part + k);
    for (int k = 1; k < parts; k++)
        for (size_t i = 0; i < size; i++) z[i] += part[k].z[i];
    free(extra);
    return 0;
}
