"""What can stop a load test before it has a result.

LoadTestError
├── ScenarioError       a scenario or a trace cannot be used
└── ServerUnavailable   the server does not answer, or not as an OpenAI-compatible one
"""

__all__ = ["LoadTestError", "ScenarioError", "ServerUnavailable"]


class LoadTestError(Exception):
    """The run cannot be done; the message says why."""


class ScenarioError(LoadTestError):
    """A scenario or a trace cannot be used; the message says where and why."""


class ServerUnavailable(LoadTestError):
    """The server does not answer, or not as an OpenAI-compatible one."""
