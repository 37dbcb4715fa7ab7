"""Chat in a terminal: a prompt that answers, one shot, and piped scripts of turns and commands.

Example:

    repl(Chat(MoDLlama("mod.gguf")))
"""

import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from mod_export.errors import UserError
from mod_export.runtime.llama import MoDLlama
from mod_export.serving.chat import Chat

HELP = """\
/reset        forget the conversation
/stats        activation of each unit, KV memory, graphs
/threshold    show the shift of all thresholds
/threshold X  shift all thresholds by X in logit space from the next token on. Above 0 fewer tokens
              are active; 0 is the file's own. `/threshold X all` reads the conversation again
/help         this text
/quit         leave (also Ctrl-D); Ctrl-C stops an answer"""
COMMANDS = ("/reset", "/stats", "/threshold", "/help", "/quit")


@contextmanager
def stop_on_interrupt(llm: MoDLlama) -> Iterator[None]:
    """Let Ctrl-C stop the answer after the token or prompt batch in work, inside the block.

    Ctrl-C never ends a decode in the middle.
    """

    def stop(*_):
        llm.stop = True

    llm.stop = False
    former = signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, former)


def answer_once(chat: Chat, prompt: str) -> bool:
    """Print one answer alone on stdout, and the status on stderr; False if Ctrl-C stopped it."""
    with stop_on_interrupt(chat.llm):
        for piece in chat.ask(prompt):
            print(piece, end="", flush=True)
    print(flush=True)
    chat.notice(chat.status())
    return not chat.llm.stop


def run_lines(chat: Chat, lines: list[str]) -> bool:
    """Run turns and commands from a pipe, one a line; False if one of them failed."""
    all_ran = True
    for line in filter(None, map(str.strip, lines)):
        try:
            if not _turn(chat, line):
                break
        except UserError as exc:
            chat.notice(f"error: {exc}")
            all_ran = False
    return all_ran


def welcome(llm: MoDLlama) -> str:
    """The first line of a chat: what is routed, and the context."""
    kinds = ", ".join(f"{sum(u.kind == kind for u in llm.units)} {kind}" for kind in llm.kinds)
    trained = llm.n_ctx_train
    beyond = (
        f" (beyond the {trained} that the model was trained for)" if llm.n_ctx() > trained else ""
    )
    what = f"routed units: {kinds}" if kinds else "dense model"
    return f"{llm.model_path}: {what}; context {llm.n_ctx()}{beyond}; /help lists the commands"


def repl(chat: Chat) -> None:
    """Run turns and commands from the terminal until /quit or Ctrl-D."""
    with suppress(ImportError):
        import readline  # noqa: F401  editing and history in input()
    while True:
        try:
            line = input("> ").strip()
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print("\n(/quit or Ctrl-D to leave)")
            continue
        try:
            if line and not _turn(chat, line):
                return
        except UserError as exc:
            chat.notice(f"error: {exc}")


def _turn(chat: Chat, line: str) -> bool:
    """Run one question or command; False to leave."""
    name, _, argument = line.partition(" ")
    if name == "/quit":
        return False
    if name == "/reset":
        chat.reset()
        chat.notice("conversation forgotten")
    elif name == "/stats":
        chat.notice(chat.stats())
    elif name == "/threshold":
        chat.set_shift(argument.strip())
    elif name == "/help":
        chat.notice(HELP)
    elif name.startswith("/"):
        chat.notice(f"unknown command {name}; one of {', '.join(COMMANDS)}")
    else:
        answer_once(chat, line)
    return True


def is_script(text: str) -> bool:
    """Whether piped text is a script of turns: one of its lines is a command."""
    return any(line.split(" ")[0] in COMMANDS for line in text.splitlines())
