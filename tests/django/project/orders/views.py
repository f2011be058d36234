from django.http import HttpResponse
from django.shortcuts import aget_object_or_404, get_object_or_404

from .models import Order, Status


def ship(request, pk):
    get_object_or_404(Order, pk=pk).set_goal(Status.SHIPPED)
    return HttpResponse("saved\n")


async def ship_async(request, pk):
    order = await aget_object_or_404(Order, pk=pk)
    await order.aset_goal(Status.SHIPPED)
    return HttpResponse("saved\n")
