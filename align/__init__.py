"""kilter"""
