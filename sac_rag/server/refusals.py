"""Refusal: why a request gets no answer, as a status and an error in OpenAI's format."""

from __future__ import annotations

from typing import Any

from fastapi.responses import JSONResponse
from pydantic import ValidationError

# OpenAI's types of errors, by status; 4xx without one are "invalid_request_error".
_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
_LONGEST_NAME = 80  # characters of a field's name that are repeated in a message


class RefusalError(Exception):
    """A request that is not answered.

    The message repeats names of fields and numbers, never a text of the request or of a chunk.

    Attributes:
        status: HTTP status.
        message: What was expected, what was got, what to do.
        code: Short name of the reason, for programs.
        param: Name of the field, if it is one field's fault.
        headers: Further headers of the response.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.code = code
        self.param = param
        self.headers = headers or {}

    def body(self) -> dict[str, Any]:
        """The error in OpenAI's format."""
        if self.status >= 500:
            kind = "server_error"
        else:
            kind = _TYPES.get(self.status, "invalid_request_error")
        error = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return {"error": error}

    def response(self) -> JSONResponse:
        """The response with this error."""
        return JSONResponse(self.body(), self.status, self.headers)


def of_validation(error: ValidationError) -> RefusalError:
    """The refusal of a body with wrong, missing or unknown fields: the first of them, by name."""
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    param = ".".join(map(_name, first["loc"])) or None
    if first["type"] == "json_invalid":
        return RefusalError(400, "the body must be a JSON object, was not", code="invalid_json")
    if first["type"] == "extra_forbidden":
        message = f"unknown field {param}"
        return RefusalError(400, message, code="unknown_parameter", param=param)
    # Pydantic's own validators say "Value error, …"; ours are whole sentences.
    text = first["msg"].removeprefix("Value error, ")
    message = f"{param}: {text}" if param else text
    return RefusalError(400, message, code="invalid_value", param=param)


def _name(part: str | int) -> str:
    if isinstance(part, int):
        return str(part)
    return part[:_LONGEST_NAME].encode("ascii", "backslashreplace").decode()
