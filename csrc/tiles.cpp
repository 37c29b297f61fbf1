#include "tiles.h"

#include "units.h"

#if SPECKV_HAS_TILES
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace speckv {

#if SPECKV_HAS_TILES
namespace {

thread_local int64_t shaped = 0;  // for what: 0 is nothing

struct alignas(kTileBytes) Configuration {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};
};
static_assert(sizeof(Configuration) == 64);

SPECKV_TILES void configure(const Configuration& configuration) {
    asm volatile("ldtilecfg %0" : : "m"(configuration));
}

SPECKV_TILES void release() {
    asm volatile("tilerelease");
}

}  // namespace

bool may_use_tiles() {
    constexpr unsigned kAll = 1u << 22 | 1u << 24 | 1u << 25;  // AMX-BF16, AMX-TILE, AMX-INT8
    constexpr int kRequest = 0x1023, kTileData = 18;           // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    unsigned a, b, c, d;
    return __get_cpuid_count(7, 0, &a, &b, &c, &d) != 0 && (d & kAll) == kAll &&
           syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
}

TileUse::TileUse() {
    shaped = 0;
}

TileUse::~TileUse() {
    if (shaped != 0) {
        release();  // or every switch to another thread saves them
        shaped = 0;
    }
}

void shape_tiles(Shape shape, int64_t inputs) {
    const int64_t wanted = shape == Shape::kWeightsFirst ? inputs : -inputs;
    if (shaped == wanted) {
        return;
    }
    Configuration configuration;
    for (int tile = 0; tile < 8; ++tile) {
        const bool is_sum = tile < 4, is_second = tile >= 6;
        const bool is_narrow = shape == Shape::kWeightsFirst && (is_sum || is_second);
        const bool is_low = shape == Shape::kInputsFirst && !is_second;
        configuration.row_bytes[tile] = static_cast<uint16_t>(is_narrow ? 4 * inputs : kTileBytes);
        configuration.rows[tile] = static_cast<uint8_t>(is_low ? inputs : kTileHeight);
    }
    configure(configuration);
    shaped = wanted;
}
#else
bool may_use_tiles() {
    return false;
}

TileUse::TileUse() = default;
TileUse::~TileUse() = default;
#endif

}  // namespace speckv
