// What the driver is asked to do: named numbers and arrays from a file (see emulate.py, which writes it).
//
// Every array is allocated alone, ends where its memory ends and starts `offset` bytes beyond a 64-byte boundary,
// what lies before it poisoned: the address sanitizer sees any access beyond it.
#pragma once
#include <sanitizer/asan_interface.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <string>
#include <vector>

#include "simt.h"

struct Array {
  std::string name;
  char* data = nullptr;
  size_t bytes = 0;
  bool is_output = false;
};

class Request {
 public:
  explicit Request(const char* path) : file_(fopen(path, "rb")) {
    if (!file_) simt::fail("cannot read %s", path);
    for (char kind; fread(&kind, 1, 1, file_) == 1;) {
      const std::string name = text();
      if (kind == 'n') {
        numbers_[name] = value<double>();
      } else if (kind == 's') {
        strings_[name] = text();
      } else {
        arrays_.push_back(array(name, kind == 'o'));
      }
    }
    fclose(file_);
  }

  double number(const std::string& name) const {
    const auto found = numbers_.find(name);
    if (found == numbers_.end()) simt::fail("the request names no %s", name.c_str());
    return found->second;
  }
  int64_t integer(const std::string& name) const { return static_cast<int64_t>(number(name)); }
  int64_t integer(const std::string& name, int64_t otherwise) const {
    return numbers_.count(name) ? integer(name) : otherwise;
  }
  std::string string(const std::string& name) const { return strings_.at(name); }

  // The array of that name; null where the request has none.
  template <class T>
  T* get(const std::string& name) const {
    for (const Array& a : arrays_)
      if (a.name == name) return reinterpret_cast<T*>(a.data);
    return nullptr;
  }

  std::vector<Array>& arrays() { return arrays_; }

 private:
  template <class T>
  T value() {
    T v;
    if (fread(&v, sizeof v, 1, file_) != 1) simt::fail("truncated request");
    return v;
  }
  std::string text() {
    std::string s(value<uint32_t>(), '\0');
    if (fread(s.data(), 1, s.size(), file_) != s.size()) simt::fail("truncated request");
    return s;
  }
  Array array(const std::string& name, bool is_output) {
    Array a;
    a.name = name;
    a.bytes = value<uint64_t>();
    a.is_output = is_output;
    const size_t before = 128 + value<uint32_t>();
    char* memory = static_cast<char*>(malloc(before + a.bytes + 64));
    char* boundary = memory + (64 - reinterpret_cast<uintptr_t>(memory) % 64) % 64;
    a.data = boundary + before;
    if (!is_output && fread(a.data, 1, a.bytes, file_) != a.bytes) simt::fail("truncated request");
    ASAN_POISON_MEMORY_REGION(memory, static_cast<size_t>(a.data - memory) & ~size_t{7});
    ASAN_POISON_MEMORY_REGION(a.data + a.bytes, static_cast<size_t>(memory + before + a.bytes + 64 - a.data - a.bytes));
    return a;
  }

  FILE* file_;
  std::map<std::string, double> numbers_;
  std::map<std::string, std::string> strings_;
  std::vector<Array> arrays_;
};
