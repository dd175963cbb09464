"""Arguments of scripts that compare models: a name and what was measured of each."""

from absl import app


def named_files(arguments, form):
    """Takes arguments apart at their last "=".

    Args:
      arguments: Of the command line, such as "dense=nats.json".
      form: Of every argument, as a message says it.

    Returns:
      What stands behind it by name, of two models or more.

    Raises:
      app.UsageError: There is no "=", or there are fewer models.
    """
    found = {}
    for argument in arguments:
        name, separator, value = argument.rpartition("=")
        if not separator:
            raise app.UsageError(f"{argument!r}; expected {form}")
        found[name] = value
    if len(found) < 2:
        raise app.UsageError(f"{len(found)} models; expected two or more, {form} each")
    return found
