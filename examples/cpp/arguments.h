// Numbers of the command line. Throws std::runtime_error.
#pragma once

#include <charconv>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <system_error>
#include <vector>

// A whole number from 0 to `last`; `what` is what it is called.
inline int64_t whole_number(const std::string& text, const std::string& what, int64_t last) {
  int64_t found = 0;
  const char* end = text.data() + text.size();
  const auto [stopped, error] = std::from_chars(text.data(), end, found);
  if (error != std::errc() || stopped != end || found < 0 || found > last)
    throw std::runtime_error(what + " " + text + ": a whole number from 0 to " + std::to_string(last) + " is expected");
  return found;
}

// The ids of PROGRAM BUNDLE COUNT TOKEN..., and COUNT in `wanted`: together no more than the context has room for.
inline std::vector<int64_t> prompt_tokens(int count, char** arguments, int64_t vocabulary, int64_t context, int64_t& wanted) {
  wanted = whole_number(arguments[2], "COUNT", INT32_MAX);
  std::vector<int64_t> tokens;
  for (int i = 3; i < count; ++i) tokens.push_back(whole_number(arguments[i], "TOKEN", vocabulary - 1));
  if (static_cast<int64_t>(tokens.size()) + wanted > context)
    throw std::runtime_error("too many tokens for the context, " + std::to_string(context));
  return tokens;
}
