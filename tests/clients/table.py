"""The clients that `make clients` tries: one row each."""

from dataclasses import dataclass

__all__ = ["CLIENTS", "PAGE", "Client"]

PAGE = "clients.md"


@dataclass(frozen=True, slots=True)
class Client:
    """What is installed, at which versions, and the heading on the page below which the lines stand that are run.

    `is_quick` ones take seconds to install, and no other test has them, so that CI tries them. With `borrows_torch`
    the server's own torch is linked in, since the one that the package would bring has gigabytes of CUDA. `alone`
    are packages that insist on those and come without what they ask for, which is among `packages` as far as the client
    needs it.
    """

    name: str
    heading: str
    packages: tuple[str, ...]
    is_node: bool = False
    is_quick: bool = False
    borrows_torch: bool = False
    alone: tuple[str, ...] = ()


# Of what `vllm` asks for, what its client needs; the rest is for GPUs.
_VLLM = """
regex==2026.11.19 cachetools==8.0.2 psutil==7.2.2 numpy==2.3.5 requests==2.34.2 tqdm==4.70.1 blake3==1.0.11
py-cpuinfo==9.0.0 transformers==5.20.2 protobuf==7.36.2 aiohttp==3.14.5 pydantic==2.14.4 openai==3.57.0
orjson==3.13.0 prometheus_client==0.26.0 pillow==13.0.0 tiktoken==0.14.0 partial-json-parser==0.2.1.1.post7
pyzmq==27.3.0 msgspec==0.23.0 PyYAML==6.0.4 einops==0.8.2 cloudpickle==3.1.3 python-json-logger==4.2.0
pybase64==1.5.1 cbor2==6.3.0 setproctitle==1.3.8 fastapi==0.136.3 sentencepiece==0.2.3 watchfiles==1.3.0
ijson==3.6.0 depyf==0.20.0 jsonschema==4.26.0 oss-harmony==0.0.11 mcp==2.3.0 anthropic==2.14.0
mistral_common==1.13.1 lark==1.2.2 model-hosting-container-standards==0.1.16 uvloop==0.23.0
apache-tvm-ffi==0.1.15.post2 llguidance==1.9.1
"""

CLIENTS = (
    Client("openai", "openai, Python", ("openai==3.57.0",)),
    Client("openai-node", "openai, Node", ("openai@6.49.0",), is_node=True),
    Client("langchain", "LangChain", ("langchain-openai==1.7.4",)),
    Client(
        "llama-index",
        "LlamaIndex",
        ("llama-index-llms-openai-like==0.8.1", "llama-index-embeddings-openai-like==0.4.0"),
    ),
    Client("instructor", "instructor", ("instructor==1.17.0",)),
    Client("openai-agents", "openai-agents", ("openai-agents==0.24.0",)),
    Client("anthropic", "anthropic", ("anthropic==2.14.0",)),
    Client("pydantic-ai", "pydantic-ai", ("pydantic-ai-slim[openai]==2.68.0",)),
    Client("litellm", "litellm", ("litellm==1.110.2",)),
    Client("litellm-proxy", "litellm's proxy", ("litellm[proxy]==1.108.7",)),
    Client("vercel-ai", "Vercel AI SDK", ("ai@7.0.173", "@ai-sdk/openai-compatible@3.0.92", "zod@4.6.7"), is_node=True),
    Client("outlines", "outlines", ("outlines==1.3.3", "openai==3.57.0")),
    Client("lorax-client", "lorax-client", ("lorax-client==0.6.3",), is_quick=True),
    Client("text-generation", "text-generation", ("text-generation==0.7.0",), is_quick=True),
    Client("huggingface_hub", "huggingface_hub", ("huggingface_hub==2.4.0",), is_quick=True),
    Client("ollama", "ollama", ("ollama==0.6.3",), is_quick=True),
    Client("lm-eval", "lm-eval", ("lm_eval[api]==0.4.13",)),
    Client(
        "vllm-bench",
        "vllm bench serve",
        tuple(_VLLM.split()),
        borrows_torch=True,
        alone=("vllm==0.33.0", "xgrammar==0.2.9"),
    ),
    Client("guidellm", "guidellm", ("guidellm==0.8.1",), borrows_torch=True),
    Client("aiperf", "aiperf", ("aiperf==0.13.0",)),
)
