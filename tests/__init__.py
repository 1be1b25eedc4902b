# SPDX-License-Identifier: Apache-2.0
from tests import typechecker  # noqa: F401 - pytest's --jaxtyping-packages looks it up here
