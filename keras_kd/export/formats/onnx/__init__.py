"""ONNX files: conversion, integer arithmetic, devices."""
