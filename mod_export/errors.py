"""The one exception for everything a user can cause and cure."""


class UserError(Exception):
    """Bad input, told in one line: what is wrong and where (message), what to do about it (cure).

    The command line prints `error: message; cure` on stderr and exits with 2.
    """

    def __init__(self, message: str, cure: str = ""):
        self.message, self.cure = " ".join(message.split()), " ".join(cure.split())
        super().__init__(f"{self.message}; {self.cure}" if self.cure else self.message)


def template_error(
    exc: Exception, subject: str = "this conversation", where: str = "", cure: str = ""
) -> UserError:
    """The error for a chat template that refuses `subject`; `where` names the file and line."""
    place = f"{where}: " if where else ""
    return UserError(f"{place}the model's chat template refuses {subject}: {exc}", cure)
