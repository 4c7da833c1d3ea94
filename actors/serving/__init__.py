"""The HTTP front: requests in OpenAI's form to a generator, and its tokens back.

Nothing in this package knows where the generator lives: :mod:`actors.serving.backend` says what it must do, and the
Serve application (:mod:`actors.service`) hands one in.
"""
