"""Will it fit, how long will a step take at least, and what would make it smaller?"""
