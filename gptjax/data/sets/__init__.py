# SPDX-License-Identifier: Apache-2.0
"""Sources of documents, a module each, by name.

A module has documents_of(path, text_field) and identity(path). One whose files can be read side by
side has parts(path), in order, and documents_in(part, text_field), too.
"""
