"""The clients that `make clients` tries: one row each."""

from dataclasses import dataclass

__all__ = ["CLIENTS", "LEFT_OUT", "PAGE", "Client"]

PAGE = "clients.md"


@dataclass(frozen=True, slots=True)
class Client:
    """What is installed, at which versions, and the heading on the page below which the lines stand that are run.

    `is_quick` ones, which take seconds to install, are what CI tries.
    """

    name: str
    heading: str
    packages: tuple[str, ...]
    is_node: bool = False
    is_quick: bool = False


CLIENTS = (
    Client("openai", "openai, Python", ("openai==3.57.0",), is_quick=True),
    Client("openai-node", "openai, Node", ("openai@6.49.0",), is_node=True),
    Client("langchain", "LangChain", ("langchain-openai==1.7.4",)),
    Client("llama-index", "LlamaIndex", ("llama-index-llms-openai-like==0.8.1",)),
    Client("instructor", "instructor", ("instructor==1.17.0",)),
    Client("openai-agents", "openai-agents", ("openai-agents==0.24.0",)),
    Client("anthropic", "anthropic", ("anthropic==2.14.0",), is_quick=True),
    Client("pydantic-ai", "pydantic-ai", ("pydantic-ai-slim[openai]==2.68.0",)),
    Client("litellm", "litellm", ("litellm==1.110.2",)),
    Client("vercel-ai", "Vercel AI SDK", ("ai@7.0.173", "@ai-sdk/openai-compatible@3.0.92", "zod@4.6.7"), is_node=True),
    Client("outlines", "outlines", ("outlines==1.3.3", "openai==3.57.0")),
    Client("lorax-client", "lorax-client", ("lorax-client==0.6.3",), is_quick=True),
    Client("text-generation", "text-generation", ("text-generation==0.7.0",), is_quick=True),
    Client("huggingface_hub", "huggingface_hub", ("huggingface_hub==2.4.0",), is_quick=True),
    Client("ollama", "ollama", ("ollama==0.6.3",), is_quick=True),
)

LEFT_OUT = {
    "aiperf": "not tried yet",
    "guidellm": "not tried yet",
    "litellm proxy": "its extra `proxy` wants `litellm-proxy` of the same version, which the package index has not",
    "lm-eval": "its installation was not waited for",
    "vllm bench serve": "the package `vllm` insists on a torch of its own with CUDA, gigabytes of it",
}
"""Clients that are not installed, and why."""
