// Memory that a thread will read soon, asked for while it does what needs none.
#pragma once

#include <cstddef>

namespace baton {

class Ahead {
 public:
  // Forgets what was still to be asked for.
  void clear() { count_ = next_ = 0, room_ = kBytes; }

  // Pieces are asked for in this order; what is too much is left out.
  void add(const void* data, size_t bytes) {
    if (bytes > room_) bytes = room_;
    if (!bytes || count_ == kPieces) return;
    const char* at = static_cast<const char*>(data);
    piece_[count_++] = {at, at + bytes};
    room_ -= bytes;
  }

  // Asks for the next `lines` cache lines, into the second cache.
  void ask(int lines) {
    for (; lines > 0 && next_ < count_; lines--) {
      Piece& piece = piece_[next_];
      __builtin_prefetch(piece.at, 0, 2);
      piece.at += 64;
      if (piece.at >= piece.end) next_++;
    }
  }

 private:
  static constexpr size_t kBytes = 128 << 10;
  static constexpr int kPieces = 16;
  struct Piece {
    const char *at, *end;
  };
  Piece piece_[kPieces];
  int count_ = 0, next_ = 0;
  size_t room_ = kBytes;
};

}  // namespace baton
