// Runs small passes with weights drawn from a seed and prints a checksum of their logits and pages, so
// that machines can be compared that cannot run the tests. Arguments: levels; "" is the best one.
#include <cstdio>
#include <cstring>
#include <string>

#include "crc32c.h"
#include "engine.h"

using namespace baton;

namespace {

constexpr int kHidden = 100, kHeads = 6, kKvHeads = 2, kDim = 20, kInner = 150, kVocab = 70;
constexpr int kContext = 640, kBlocks = kContext / kPageTokens, kPrompt = 600;

// Numbers that are the same everywhere.
struct Draw {
  uint64_t state = 88172645463325252u;
  uint32_t bits() {
    state ^= state << 13, state ^= state >> 7, state ^= state << 17;
    return uint32_t(state >> 32);
  }
  float value() { return float(int32_t(bits()) >> 8) / 8388608.0f; }  // -1 to 1
  std::vector<float> values(size_t count, float scale, float shift) {
    std::vector<float> all(count);
    for (float& v : all) v = value() * scale + shift;
    return all;
  }
};

struct Weights {
  Draw draw;
  std::vector<Room<unsigned char>*> rooms;  // live until the process ends

  Matrix matrix(Format format, int rows, int cols) {
    Matrix m{nullptr, format, rows, cols, is_integer(format) ? 64 : 0};
    auto* room = new Room<unsigned char>;
    room->reserve(m.bytes());
    m.data = room->data();
    rooms.push_back(room);
    if (format == Format::kF32) {
      const std::vector<float> all = draw.values(size_t(rows) * cols, 0.2f, 0);
      std::memcpy(room->data(), all.data(), all.size() * 4);
    } else if (format == Format::kPackedBF16) {
      std::vector<uint16_t> all(size_t(rows) * cols);
      for (uint16_t& w : all) w = uint16_t(0x3D00 + (draw.bits() & 0x80FF));
      pack_bf16(m, all.data(), room->data());
    } else {
      std::vector<int8_t> codes(size_t(rows) * cols);
      std::vector<uint16_t> scales(size_t(rows) * m.groups(), 0x2400);  // 1/64
      const int top = format == Format::kPackedInt8 ? 127 : 7;
      for (int8_t& c : codes) c = int8_t(int(draw.bits() % (2 * top + 1)) - top);
      pack_int(m, codes.data(), scales.data(), room->data());
    }
    return m;
  }
};

Model model_of(Format format, bool kv_bf16, const std::vector<float>& cos, const std::vector<float>& sin) {
  Weights w;
  Model m{kVocab, kHidden, 1, kHeads, kKvHeads, kDim, kInner, kContext, 1e-5f, kv_bf16,
          {}, {}, {}, {}, cos.data(), sin.data()};
  m.embed = w.matrix(Format::kF32, kVocab, kHidden), m.head = w.matrix(format, kVocab, kHidden);
  m.final_norm = w.draw.values(kHidden, 0.2f, 1);
  Layer l;
  l.q = w.matrix(format, kHeads * kDim, kHidden), l.k = w.matrix(format, kKvHeads * kDim, kHidden);
  l.v = w.matrix(format, kKvHeads * kDim, kHidden), l.o = w.matrix(format, kHidden, kHeads * kDim);
  l.gate = w.matrix(format, kInner, kHidden), l.up = w.matrix(format, kInner, kHidden);
  l.down = w.matrix(format, kHidden, kInner);
  l.attention_norm = w.draw.values(kHidden, 0.2f, 1), l.mlp_norm = w.draw.values(kHidden, 0.2f, 1);
  m.layer.push_back(std::move(l));
  return m;
}

// A prompt in two chunks and one more token; the checksum of all logits and of the pages.
uint32_t run(Format format, bool kv_bf16, const std::string& level) {
  Draw draw;
  const std::vector<float> cos = draw.values(size_t(kContext) * kDim / 2, 1, 0);
  const std::vector<float> sin = draw.values(size_t(kContext) * kDim / 2, 1, 0);
  const int element = kv_bf16 ? 2 : 4;
  const size_t page = size_t(2) * kKvHeads * kPageTokens * kDim * element;
  const size_t offset = kBlocks * sizeof(PageHeader);
  Room<unsigned char> arena;
  arena.reserve(offset + kBlocks * page);
  const Pages pages(arena.data(), {0, offset, page, kBlocks, 1, 1, kKvHeads, kDim, element});
  Engine engine(model_of(format, kv_bf16, cos, sin), pages, level, 2, {});
  std::vector<int32_t> tokens, positions, which, owner(kPrompt + 1, 0);
  std::vector<uint32_t> table;
  for (int i = 0; i <= kPrompt; i++) tokens.push_back(int(draw.bits() % kVocab)), positions.push_back(i);
  for (int i = 0; i < kBlocks; i++) table.push_back(uint32_t(kBlocks - 1 - i));
  uint32_t crc = 0;
  const int cuts[] = {0, 333, kPrompt, kPrompt + 1};
  for (int i = 0; i < 3; i++) {
    const int begin = cuts[i], rows = cuts[i + 1] - begin;
    engine.begin(tokens.data() + begin, positions.data() + begin, owner.data(), rows, table.data(), 1,
                 kBlocks, 1);
    std::vector<float> logits(size_t(rows) * kVocab);
    engine.step(nullptr, logits.data());
    crc = crc32c(logits.data(), logits.size() * 4, crc);
  }
  return crc32c(arena.data() + offset, kBlocks * page, crc);
}

}  // namespace

int main(int count, char** levels) {
  const char* names[] = {"plain", "bf16", "int8", "int4"};
  const Format formats[] = {Format::kF32, Format::kPackedBF16, Format::kPackedInt8, Format::kPackedInt4};
  for (int i = 1; i < count; i++)
    for (int f = 0; f < 4; f++)
      for (bool kv_bf16 : {false, true})
        std::printf("%s kv-%s %s %08x\n", names[f], kv_bf16 ? "bf16" : "f32",
                    *levels[i] ? levels[i] : "best", run(formats[f], kv_bf16, levels[i]));
}
