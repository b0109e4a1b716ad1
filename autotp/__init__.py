"""autotp"""
