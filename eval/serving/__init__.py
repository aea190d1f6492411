"""Load tests of servers with OpenAI's protocol (vLLM, SGLang, llama.cpp)."""
