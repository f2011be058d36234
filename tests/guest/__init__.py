"""The host's own tests, without an engine on its apps and with one: does it change what they say?"""
