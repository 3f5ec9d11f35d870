"""Talk to `arriero serve MODEL` with OpenAI's client: `python examples/openai_client.py [URL] [API_KEY]`."""

import sys

import openai

url = sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8011/v1"
client = openai.OpenAI(base_url=url, api_key=sys.argv[2] if len(sys.argv) > 2 else "none")
model = client.models.list().data[0].id

reply = client.chat.completions.create(
    model=model, messages=[{"role": "user", "content": "What is the capital of Peru?"}], max_tokens=24, temperature=0
)
print(f"{model}: {reply.choices[0].message.content}")

stream = client.chat.completions.create(
    model=model, messages=[{"role": "user", "content": "Name three colours."}], max_tokens=24, stream=True
)
for chunk in stream:
    if chunk.choices:
        print(chunk.choices[0].delta.content or "", end="", flush=True)
print()
