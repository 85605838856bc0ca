"""Weights in and out: other people's files into model folders, and back.

Imports point downwards only:

    cli -> importing, exporting, verifying, inspecting, listing     the commands
           identifying, formats                                     what they share
    families/    one module per family of public networks, and the registry
    source, layout, huggingface, family, networks/                  what families are made of
    rules/       tables that say which tensor of a file is which parameter
    containers/  readers and writers of file formats, which know no network
"""
