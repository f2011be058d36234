"""Does the suite notice when the code is broken?"""
