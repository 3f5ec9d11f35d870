// JSON as a bundle's files have it: objects, arrays, strings, numbers, true, false and null. Throws std::runtime_error.
#pragma once

#include <cstdlib>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

struct Json {
  enum class Kind { null, boolean, number, string, array, object } kind = Kind::null;
  bool boolean = false;
  double number = 0;
  std::string string;
  std::vector<Json> array;
  std::map<std::string, Json> object;

  const Json& at(const std::string& key) const {
    auto found = object.find(key);
    if (found == object.end()) throw std::runtime_error("JSON: no " + key);
    return found->second;
  }
  int64_t integer() const {
    if (kind != Kind::number) throw std::runtime_error("JSON: a number is expected");
    return static_cast<int64_t>(number);
  }
  static Json parse(std::string_view text);
};

class JsonReader {
 public:
  explicit JsonReader(std::string_view text) : text_(text) {}

  Json value(int depth = 0) {
    if (depth > 100) fail("is nested too deeply");
    Json found;
    switch (peek()) {
      case '{':
        found.kind = Json::Kind::object;
        for (take('{'); peek() != '}';) {
          if (!found.object.empty()) take(',');
          std::string key = string();
          take(':');
          found.object[key] = value(depth + 1);
        }
        take('}');
        return found;
      case '[':
        found.kind = Json::Kind::array;
        for (take('['); peek() != ']';) {
          if (!found.array.empty()) take(',');
          found.array.push_back(value(depth + 1));
        }
        take(']');
        return found;
      case '"':
        found.kind = Json::Kind::string;
        found.string = string();
        return found;
      case 't':
      case 'f':
        found.kind = Json::Kind::boolean;
        found.boolean = text_[at_] == 't';
        word(found.boolean ? "true" : "false");
        return found;
      case 'n':
        word("null");
        return found;
      default:
        found.kind = Json::Kind::number;
        std::string digits;
        while (at_ < text_.size() && std::string_view("+-.eE0123456789").find(text_[at_]) != std::string_view::npos)
          digits += text_[at_++];
        if (digits.empty()) fail("is broken");
        found.number = std::strtod(digits.c_str(), nullptr);
        return found;
    }
  }

 private:
  [[noreturn]] void fail(const char* what) { throw std::runtime_error(std::string("JSON ") + what); }
  char peek() {
    while (at_ < text_.size() && std::string_view(" \t\r\n").find(text_[at_]) != std::string_view::npos) ++at_;
    if (at_ >= text_.size()) fail("ends too early");
    return text_[at_];
  }
  void take(char wanted) {
    if (peek() != wanted) fail("is broken");
    ++at_;
  }
  void word(std::string_view wanted) {
    if (text_.substr(at_, wanted.size()) != wanted) fail("is broken");
    at_ += wanted.size();
  }
  std::string string() {
    take('"');
    std::string found;
    while (at_ < text_.size() && text_[at_] != '"') {
      if (text_[at_] == '\\') ++at_;  // what an escape means does not matter for names of tensors
      if (at_ < text_.size()) found += text_[at_++];
    }
    take('"');
    return found;
  }

  std::string_view text_;
  size_t at_ = 0;
};

inline Json Json::parse(std::string_view text) { return JsonReader(text).value(); }
