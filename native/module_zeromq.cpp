// Whole messages in and out of a ZeroMQ socket that pyzmq has made, without work for the interpreter in
// each frame and without pyzmq's thread that waits for each frame sent out of memory of ours. The
// library is the one that pyzmq has loaded.
#include <dlfcn.h>

#include <atomic>
#include <cerrno>
#include <cstring>
#include <list>
#include <memory>
#include <stdexcept>
#include <string>

#include "module.h"

namespace baton {

namespace {

// zmq.h, as far as it is needed.
struct alignas(8) Raw {
  unsigned char bytes[64];
};
constexpr int kDontWait = 1, kSendMore = 2, kPollIn = 1, kEvents = 15;
using Release = void (*)(void* data, void* hint);

struct Library {
  int (*init)(Raw*);
  int (*init_size)(Raw*, size_t);
  int (*init_data)(Raw*, void*, size_t, Release, void*);
  int (*close)(Raw*);
  void* (*data)(Raw*);
  size_t (*size)(const Raw*);
  int (*more)(const Raw*);
  int (*receive)(Raw*, void* socket, int flags);
  int (*send)(Raw*, void* socket, int flags);
  int (*option)(void* socket, int name, void* value, size_t* bytes);
};

const Library* loaded;

template <class Function>
void find(void* in, const char* name, Function* function) {
  *reinterpret_cast<void**>(function) = dlsym(in, name);
  if (*function == nullptr) throw std::runtime_error(std::string("zeromq: no ") + name);
}

// `path`: a library that is loaded and knows libzmq.
void use_zeromq(const std::string& path) {
  void* in = dlopen(path.c_str(), RTLD_NOW | RTLD_NOLOAD);
  if (in == nullptr) throw std::runtime_error("zeromq: not loaded: " + path);
  auto* library = new Library;
  find(in, "zmq_msg_init", &library->init);
  find(in, "zmq_msg_init_size", &library->init_size);
  find(in, "zmq_msg_init_data", &library->init_data);
  find(in, "zmq_msg_close", &library->close);
  find(in, "zmq_msg_data", &library->data);
  find(in, "zmq_msg_size", &library->size);
  find(in, "zmq_msg_more", &library->more);
  find(in, "zmq_msg_recv", &library->receive);
  find(in, "zmq_msg_send", &library->send);
  find(in, "zmq_getsockopt", &library->option);
  loaded = library;
}

// A frame that has come.
class Frame {
 public:
  Frame() { loaded->init(&raw); }
  ~Frame() { loaded->close(&raw); }
  Frame(const Frame&) = delete;
  py::buffer_info buffer() {
    return {static_cast<const unsigned char*>(loaded->data(&raw)), py::ssize_t(loaded->size(&raw))};
  }
  Raw raw;
};

// Frames of one message that are read where they lie, until `left` is 0. ZeroMQ counts it down on a
// thread without the interpreter; whoever uses a socket next lets go of the buffers.
struct Lent {
  std::list<py::buffer_info> buffers;
  std::shared_ptr<std::atomic<int>> left = std::make_shared<std::atomic<int>>(0);
};

std::list<Lent>& all_lent() {
  static auto* lent = new std::list<Lent>;  // outlives the interpreter, as ZeroMQ's threads may
  return *lent;
}

// Lets go of what is not read any more. Letting go may run anything, so the list is complete before.
void reap() {
  std::list<Lent>& lent = all_lent();
  std::list<Lent> gone;
  for (auto at = lent.begin(); at != lent.end();) {
    const auto one = at++;
    if (one->left->load(std::memory_order_acquire) == 0) gone.splice(gone.end(), lent, one);
  }
}

void give_back(void*, void* hint) {
  auto* left = static_cast<std::shared_ptr<std::atomic<int>>*>(hint);
  (*left)->fetch_sub(1, std::memory_order_release);
  delete left;
}

struct Sending {
  std::shared_ptr<std::atomic<int>> left;
  bool done() const { return left->load(std::memory_order_acquire) == 0; }
};

// Used by the thread that owns the socket, and not after the socket has been closed.
class Socket {
 public:
  // `copied_max`: frames of at most so many bytes are copied.
  Socket(uintptr_t socket, size_t copied_max)
      : socket_(reinterpret_cast<void*>(socket)), copied_max_(copied_max) {
    if (loaded == nullptr) throw std::runtime_error("zeromq: use_zeromq comes first");
  }
  bool ready() const {
    int events = 0;
    size_t bytes = sizeof events;
    return socket_ && loaded->option(socket_, kEvents, &events, &bytes) == 0 && (events & kPollIn);
  }
  // The frames of the next message, or None.
  py::object receive() const {
    reap();
    if (socket_ == nullptr) return py::none();
    py::list frames;
    for (bool more = true; more;) {
      auto frame = std::make_unique<Frame>();
      int got;
      do got = loaded->receive(&frame->raw, socket_, kDontWait);
      while (got < 0 && errno == EINTR);
      if (got < 0) return py::none();
      more = loaded->more(&frame->raw) != 0;
      frames.append(py::memoryview(py::cast(std::move(frame))));
    }
    return std::move(frames);
  }
  // Who tells when memory of the message is not read any more; None when all of it has been copied, or
  // it could not be sent.
  py::object send(const py::sequence& frames) const {
    reap();
    if (socket_ == nullptr) return py::none();
    std::vector<py::buffer_info> buffers;
    for (const py::handle frame : frames) {
      buffers.push_back(frame.cast<py::buffer>().request());
      if (buffers.back().ndim != 1 || buffers.back().strides[0] != buffers.back().itemsize)
        throw py::value_error("frames: not one piece of memory");
    }
    Lent lent;
    size_t left = buffers.size();
    for (py::buffer_info& buffer : buffers)
      if (!push(std::move(buffer), --left ? kSendMore : 0, &lent)) break;
    if (lent.buffers.empty()) return py::none();
    py::object tracker = py::cast(Sending{lent.left});
    all_lent().push_back(std::move(lent));
    return tracker;
  }
  void close() { socket_ = nullptr; }

 private:
  bool push(py::buffer_info&& buffer, int more, Lent* lent) const {
    const size_t bytes = size_t(buffer.size) * size_t(buffer.itemsize);
    Raw raw;
    if (bytes > copied_max_) {
      lent->left->fetch_add(1, std::memory_order_relaxed);
      auto* hint = new std::shared_ptr<std::atomic<int>>(lent->left);
      if (loaded->init_data(&raw, buffer.ptr, bytes, give_back, hint) < 0) {
        give_back(nullptr, hint);
        return false;
      }
      lent->buffers.push_back(std::move(buffer));
    } else {
      if (loaded->init_size(&raw, bytes) < 0) return false;
      if (bytes > 0) std::memcpy(loaded->data(&raw), buffer.ptr, bytes);
    }
    int gone;
    do gone = loaded->send(&raw, socket_, kDontWait | more);
    while (gone < 0 && errno == EINTR);
    if (gone < 0) loaded->close(&raw);
    return gone >= 0;
  }
  void* socket_;
  size_t copied_max_;
};

}  // namespace

void bind_zeromq(py::module_& m) {
  m.def("use_zeromq", &use_zeromq, py::arg("path"));
  py::class_<Frame>(m, "Frame", py::buffer_protocol()).def_buffer(&Frame::buffer);
  py::class_<Sending>(m, "Sending").def_property_readonly("done", &Sending::done);
  py::class_<Socket>(m, "Socket")
      .def(py::init<uintptr_t, size_t>(), py::arg("socket"), py::arg("copied_max"))
      .def("ready", &Socket::ready)
      .def("receive", &Socket::receive)
      .def("send", &Socket::send, py::arg("frames"))
      .def("close", &Socket::close);
}

}  // namespace baton
